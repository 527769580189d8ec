"""Chat templates to tokens: only what the assistant says is an answer, turn by turn."""

import pytest

from h3scale.data.encode import RESPONSE_BIT, encode_block, encode_records, render_prompt
from h3scale.data.records import Record
from h3scale.errors import ConfigError, DataError
from tests.tiny import CHAT_TEMPLATE, WORDS, tiny_tokenizer

SAID = " ".join(WORDS[:3]), " ".join(WORDS[3:5]), " ".join(WORDS[5:9]), WORDS[9]


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path / "tokenizer")


def conversation() -> Record:
    return Record("c", "helpful", SAID[2], SAID[3], history=(("system", WORDS[10]), ("user", SAID[0]), ("assistant", SAID[1])))


def answers_of(tokenizer, tokens) -> list[str]:
    """The runs of answer tokens, decoded with their special tokens."""
    runs, last = [], 0
    for i, flag in enumerate([*(tokens >> RESPONSE_BIT).tolist(), 0]):
        if flag and not last:
            begin = i
        if last and not flag:
            runs.append(tokenizer.decode((tokens[begin:i] & 0x7FFFFFFF).tolist()))
        last = flag
    return runs


def test_every_turn_of_the_assistant_is_an_answer_with_its_end_and_nothing_else_is(tokenizer) -> None:
    (item,) = encode_records(tokenizer, [conversation()])
    ends = tokenizer.decode([item.input_ids[-1]])
    assert [text.removesuffix(ends).strip() for text in answers_of(tokenizer, item.tokens)] == [SAID[1], SAID[3]]
    assert all(text.endswith(ends) for text in answers_of(tokenizer, item.tokens))
    whole = tokenizer.apply_chat_template(conversation().messages, tokenize=False)
    assert item.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_prompt_is_the_conversation_up_to_the_answer(tokenizer) -> None:
    (item,) = encode_records(tokenizer, [conversation()])
    prompt = render_prompt(tokenizer, conversation().messages[:-1])
    answer = [*(item.tokens >> RESPONSE_BIT)[::-1], 0].index(0)
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == item.input_ids[:-answer]
    assert render_prompt(tokenizer, SAID[0]) == render_prompt(tokenizer, [{"role": "user", "content": SAID[0]}])


@pytest.mark.parametrize("trimming", ["", " | trim"])
def test_templates_that_trim_or_write_around_turns_are_understood(tokenizer, trimming: str) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", f"m['content']{trimming}")
    (item,) = encode_records(tokenizer, [Record("r", "helpful", f" {SAID[0]} ", f" {SAID[1]} ")])
    (answer,) = answers_of(tokenizer, item.tokens)
    assert SAID[1] in answer
    assert SAID[0] not in answer


def test_a_template_that_rewrites_the_past_is_a_finding_and_not_a_wrong_label(tokenizer) -> None:
    """As Qwen3's, which drops earlier thoughts once another turn follows."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if loop.last else 'gone')")
    items = encode_block(tokenizer, [conversation(), Record("r", "helpful", SAID[0], SAID[1])])
    assert items[0] == "the chat template's conversation does not begin with its prompt"


def test_special_tokens_in_the_text_are_a_finding_of_that_record_alone(tokenizer) -> None:
    special = tokenizer.all_special_tokens[0]
    records = [Record("a", "helpful", "x", "y"), Record("b", "helpful", f"x {special}", "y"), Record("c", "helpful", "x", "y")]
    items = encode_block(tokenizer, records)
    assert [isinstance(item, str) for item in items] == [False, True, False]
    assert (items[0] == items[2]).all()
    with pytest.raises(DataError, match="record b: its text has the special token"):
        encode_records(tokenizer, records)


def test_a_tokenizer_without_a_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        encode_records(tokenizer, [])
