"""Chat templates to tokens: only what the assistant says is an answer, turn by turn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from h3scale.data import encode
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


def test_what_the_template_refuses_is_a_finding_of_that_record_alone(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    good = Record("r", "helpful", SAID[0], SAID[1])
    items = encode_block(tokenizer, [good, conversation(), good])
    assert items[1] == "the chat template refuses it (no system role)"
    assert (items[0] == items[2]).all()
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="the chat template is not valid"):
        encode_block(tokenizer, [good])


def test_added_marks_that_have_no_name_are_special_too(tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<|header|>", special=True)], special_tokens=False)
    assert "<|header|>" not in tokenizer.all_special_tokens
    (item,) = encode_block(tokenizer, [Record("r", "helpful", f"{SAID[0]} <|header|>", SAID[1])])
    assert item == "its text has the special token '<|header|>', which would end or begin a turn"


def test_a_tokenizer_without_a_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        encode_records(tokenizer, [])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>\
{% endif %}{% endfor %}"


def byte_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["user\nassistant\n\n\n the answer is  \n\n yes, no and it is so\n"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"
    )


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<unk>"])
    core.train_from_iterator(["[INST] the answer is yes [/INST] no and it is so user assistant \n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAST = {
    "chatml": (byte_level, CHATML),
    "first": (lambda: metaspace("first"), LLAMA2),
    "always": (lambda: metaspace("always"), LLAMA2),
    "words": (tiny_tokenizer, CHAT_TEMPLATE),
}
TEXTS = st.lists(st.sampled_from(["the answer", "yes", "\n", "\n\n", " ", "  ", "é", "assistant\n", "x"]), min_size=1, max_size=6)


@pytest.mark.parametrize("name", FAST)
def test_counting_added_tokens_finds_what_places_in_the_text_find(name: str) -> None:
    make, template = FAST[name]
    tokenizer = make()
    tokenizer.chat_template = template
    counted = []

    @given(st.lists(TEXTS, min_size=2, max_size=4))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(parts: list[list[str]]) -> None:
        said = ["".join(part) for part in parts]
        history = (("user", said[2]), ("assistant", said[3])) if len(said) == 4 else ()
        messages = Record("r", "helpful", said[0], said[1], history=history).messages
        ((text, places),) = encode._render(tokenizer, [messages])
        assert places is not None
        assert [places] == encode._answers(tokenizer, [messages], [text])
        flagger = encode._Flagger(tokenizer)
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        by_counting = flagger._by_counting(text, places, ids, np.array(ids, np.uint32))
        counted.append(by_counting is not None)
        assert by_counting is None or by_counting == flagger._by_offsets(text, places)
        (tokens,) = flagger.flagged([text], [places])
        assert (tokens & 0x7FFFFFFF).tolist() == ids
        answer = tokenizer.decode((tokens[tokens >> RESPONSE_BIT == 1] & 0x7FFFFFFF).tolist())
        assert name != "chatml" or said[1] in answer  # the others do not know every character

    check()
    assert np.mean(counted) > (0.3 if name in ("chatml", "words") else -1), "the fast way is never taken"
