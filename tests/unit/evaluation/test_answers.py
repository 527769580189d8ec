"""Log-probabilities of answers: prompts shared, rows packed, and still what each prompt and answer gives by itself."""

from dataclasses import replace

import pytest
import torch

from h3scale.config.base import find
from h3scale.data.encode import RESPONSE_BIT, answer_lead, encode_records, render_prompt
from h3scale.data.items import Item
from h3scale.data.records import Record
from h3scale.errors import ConfigError, DataError
from h3scale.evaluation import answers
from h3scale.evaluation.answers import encode_items, log_probs
from h3scale.evaluation.routing import route_for
from h3scale.model.router import expert_weights, forced_routing

from .conftest import THREE, WORDS, _config, _livelier


def item(prompt, *texts, name="1"):
    others = tuple(range(1, len(texts)))
    return Item(name, prompt, texts, 0, others, (0,), others)


def make_items(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator).tolist())

    return [item(words(1, 12), *dict.fromkeys(words(1, 9) for _ in range(6)), name=str(i)) for i in range(count)]


@pytest.fixture(scope="module")
def asked(tokenizer):
    found, left_out = encode_items(tokenizer, make_items(), None, 64)
    assert left_out == 0
    return found


@torch.no_grad()
def alone(model, prompt, answer):
    """A prompt and one answer in a row of their own, in fp64."""
    log_probs = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def check(model, asked, found):
    for each, values in zip(asked, found, strict=True):
        assert values == pytest.approx([alone(model, each.prompt, answer) for answer in each.answers], rel=1e-5, abs=1e-5)


def test_shared_prompts_and_packed_rows_give_what_each_answer_gives_alone(dense, moe, asked):
    for model in (dense, moe):
        check(model, asked, log_probs(model, asked))


def test_a_config_that_asks_for_router_logits_changes_nothing(moe, asked, monkeypatch):
    before = log_probs(moe, asked)
    monkeypatch.setattr(moe.config, "output_router_logits", True)
    assert log_probs(moe, asked) == before


def test_windows_of_attention_are_kept_in_all_layers_or_in_some(tokenizer, asked):
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    windowed = _livelier(MistralForCausalLM(MistralConfig(**_config(tokenizer, sliding_window=3))))
    mixed = Qwen3Config(**_config(tokenizer, sliding_window=4, use_sliding_window=True, max_window_layers=1, head_dim=8))
    assert set(mixed.layer_types) == {"full_attention", "sliding_attention"}
    for model in (windowed, _livelier(Qwen3ForCausalLM(mixed))):
        check(model, asked, log_probs(model, asked))


def test_an_item_too_large_for_a_batch_goes_in_pieces(dense, asked, monkeypatch):
    whole = log_probs(dense, asked)
    monkeypatch.setattr(answers, "BATCH_TOKENS", 24)
    assert log_probs(dense, asked) == [pytest.approx(values, abs=1e-4) for values in whole]


def test_a_route_by_alignment_reaches_every_token_of_its_item(moe, asked):
    """Items of three alignments in the same rows under the oracle: as if each had been scored with its own expert forced."""
    labels = [i % 3 for i in range(len(asked))]
    found = log_probs(moe, asked, labels, route_for(moe, THREE, "oracle", THREE.alignments))
    for label, alignment in enumerate(THREE.alignments):
        with forced_routing(moe, expert_weights(THREE, alignment)):
            own = [i for i, other in enumerate(labels) if other == label]
            check(moe, [asked[i] for i in own], [found[i] for i in own])


def test_a_prompt_is_what_the_chat_template_gives_and_no_end_token_is_scored(tokenizer):
    (found,), _ = encode_items(tokenizer, [item("cat dog", "red", "green blue")], None, 64)
    assert tokenizer.convert_ids_to_tokens(found.prompt) == ["<user>", "cat", "dog", "<end>", "<assistant>"]
    assert [tokenizer.convert_ids_to_tokens(answer) for answer in found.answers] == [["red"], ["green", "blue"]]


def test_what_a_template_writes_before_an_answer_is_not_lost(tokenizer):
    """Llama-2's template has a blank there, Qwen3's an empty thought: a model has only ever answered after it."""
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = before.replace(
            "+ message['content']", "+ ('say ' if message['role'] == 'assistant' else '') + message['content']"
        )
        assert answer_lead(tokenizer) == "say "
        (found,), _ = encode_items(tokenizer, [item("cat", "red", "blue")], None, 64)
        assert tokenizer.convert_ids_to_tokens(found.prompt)[-2:] == ["<assistant>", "say"]
    finally:
        tokenizer.chat_template = before
    assert answer_lead(tokenizer) == ""


def test_a_plain_template_stands_in_for_the_chat_template(tokenizer):
    (found,), _ = encode_items(tokenizer, [item("cat", "red", "blue")], "why {prompt} say", 64)
    assert tokenizer.convert_ids_to_tokens(found.prompt) == ["why", "cat", "say"]
    assert [tokenizer.convert_ids_to_tokens(answer) for answer in found.answers] == [["red"], ["blue"]]


def test_long_prompts_lose_their_beginning_alike_for_all_answers(tokenizer):
    items = [
        item("cat dog", "red", "green " * 6, name="a"),
        item("cat", "red " * 12, "blue", name="b"),
        item("cat", "red", "blue", name="c"),
    ]
    found, left_out = encode_items(tokenizer, items, None, 8)
    assert [each.item.id for each in found] == ["a", "c"]
    assert left_out == 1  # an answer of 12 tokens has no place behind any prompt
    assert found[0].cut == 2
    assert tokenizer.convert_ids_to_tokens(found[0].prompt) == ["dog", "<end>", "<assistant>"]
    assert len(found[0].prompt) + 6 - 1 == 8
    assert found[1].cut == 0


def test_turns_before_a_prompt_are_asked_as_training_has_them(tokenizer):
    asked = replace(item("why", "red", "green blue"), history=(("user", "cat"), ("assistant", "dog")))
    (found,), _ = encode_items(tokenizer, [asked], None, 64)
    for answer, tokens in zip(asked.answers, found.answers, strict=True):
        (trained,) = encode_records(tokenizer, [Record("1", "helpful", asked.prompt, answer, history=asked.history)])
        assert trained.input_ids == [*found.prompt, *tokens, tokenizer.eos_token_id]
        assert trained.tokens[len(found.prompt) :].min() >> RESPONSE_BIT == 1
    assert tokenizer.convert_ids_to_tokens(found.prompt[:3]) == ["<user>", "cat", "<end>"]


@pytest.mark.parametrize("path", ["recipes/chat_template.jinja", "recipes/h3fusion_llama2_7b/chat_template.jinja"])
def test_shipped_templates_write_the_same_before_every_answer_of_a_conversation(tokenizer, path):
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("cat", "dog", "why", "red"))]
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = find(path).read_text()
        whole = tokenizer.apply_chat_template(said, tokenize=False)
        assert whole.startswith(render_prompt(tokenizer, said[:-1]) + answer_lead(tokenizer) + "red")
    finally:
        tokenizer.chat_template = before


def test_turns_before_a_prompt_are_looked_at_too(tokenizer):
    forged = replace(item("cat", "red", "blue"), history=(("user", "a <end>"), ("assistant", "b")))
    system = replace(item("cat", "red", "blue", name="2"), history=(("system", "no"),))
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + before
        )
        with pytest.raises(DataError) as error:
            encode_items(tokenizer, [forged, system], None, 64)
        tokenizer.chat_template = None
        with pytest.raises(ConfigError, match="has no chat template"):
            encode_items(tokenizer, [item("cat", "red", "blue")], None, 64)
        assert len(encode_items(tokenizer, [item("cat", "red", "blue")], "why {prompt}", 64)[0]) == 1
    finally:
        tokenizer.chat_template = before
    assert error.value.findings == [
        "item 1: its text has the special token '<end>', which would end or begin a turn",
        "item 2: the chat template refuses it (no system turn)",
    ]


def test_texts_with_special_tokens_are_refused(tokenizer):
    items = [item("cat <end> <assistant> yes", "red", "blue", name="7"), item("cat", "red <end>", "blue", name="8")]
    with pytest.raises(DataError, match="item 7: its text has the special token '<end>'") as error:
        encode_items(tokenizer, items, None, 64)
    assert len(error.value.findings) == 2
