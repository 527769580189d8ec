"""Greedy answers are transformers' own; who answered adds up; exact match counts."""

import pytest
import torch

from h3scale.data.encode import render_prompt
from h3scale.data.records import Record
from h3scale.errors import DataError
from h3scale.evaluation.generate import _shares, answers, choose, end_ids, exact_match, generate, greedy, normalise

from .conftest import THREE

PROMPTS = ["cat dog moon", "why", "red green blue one two three", "no", "star star say"]


def of_transformers(model, tokenizer, prompt, max_new_tokens):
    ids = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_batched_answers_equal_single_ones_of_transformers(kind, request, tokenizer):
    model = request.getfixturevalue(kind)
    found = answers(model, tokenizer, PROMPTS, 12)
    expected = [of_transformers(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert [answer.new_ids for answer in found] == expected
    assert len({tuple(ids) for ids in expected}) > 1  # different prompts, different answers
    for answer in found:
        assert answer.stopped == (answer.new_ids[-1] == tokenizer.eos_token_id)
        assert "<end>" not in answer.text


def test_an_answer_ends_at_its_own_end(dense, tokenizer):
    """With another token as the end, every row stops at its first one, and not before."""
    longer = answers(dense, tokenizer, PROMPTS, 12)
    prompts = [answer.prompt_ids for answer in longer]
    end = longer[0].new_ids[4]
    found = greedy(dense, prompts, 12, {end})
    for ids, before in zip(found, greedy(dense, prompts, 12, set()), strict=True):
        cut = before.index(end) + 1 if end in before else 12
        assert ids == before[:cut]
    assert len(found[0]) <= 5


def test_room_is_respected_whoever_the_neighbours_are(dense, tokenizer):
    long_prompt = "cat " * 55  # 58 of 64 tokens
    alone = answers(dense, tokenizer, [long_prompt], 20)[0]
    beside = answers(dense, tokenizer, [long_prompt, "dog"], 20)
    assert len(alone.new_ids) <= 6
    assert beside[0].new_ids == alone.new_ids
    assert beside[1].new_ids == answers(dense, tokenizer, ["dog"], 20)[0].new_ids
    too_long = answers(dense, tokenizer, ["cat " * 80, "dog"], 20)
    assert too_long[0].new_ids == []
    assert too_long[1].new_ids == beside[1].new_ids
    with pytest.raises(DataError, match="83 tokens, and the model holds 64"):
        generate(dense, tokenizer, "cat " * 80)


def test_who_answered_adds_up(moe, dense, tokenizer):
    answer = generate(moe, tokenizer, "cat dog moon", 12)
    assert [share.expert for share in answer.experts] == THREE.names()
    assert [share.alignment for share in answer.experts] == list(THREE.experts)
    assert sum(share.weight for share in answer.experts) == pytest.approx(1)
    assert sum(share.first for share in answer.experts) == pytest.approx(1)
    assert "".join(piece for piece, _ in answer.pieces).strip() == answer.text
    assert {alignment for _, alignment in answer.pieces} <= set(THREE.alignments)
    assert generate(dense, tokenizer, "cat dog moon", 12).experts == []


def test_shares_of_logits_made_by_hand():
    """Two layers, two tokens, top 2: honest first in three of four, its weight 3/4 there; general never chosen."""
    three_to_one = [0.0, -9.0, torch.log(torch.tensor(3.0)).item(), -20.0]  # honest 3, helpful 1
    even = [1.0, 1.0 + 1e-4, -9.0, -9.0]  # harmless first by a hair
    logits_LTE = torch.tensor([[three_to_one, three_to_one], [three_to_one, even]])
    shares = {share.expert: share for share in _shares(logits_LTE, THREE, 2)}
    assert [shares[name].first for name in THREE.names()] == [0, 0.25, 0.75, 0]
    expected = [(3 * 0.25 + 0.5) / 4, 0.5 / 4, 3 * 0.75 / 4, 0]
    assert [shares[name].weight for name in THREE.names()] == pytest.approx(expected, abs=1e-4)


def test_exact_match_counts_equal_answers(dense, tokenizer):
    prompts = PROMPTS[:4]
    said = [answer.text for answer in answers(dense, tokenizer, prompts, 12)]
    expected = [said[0], f"  {said[1]}\n", "something else", "another thing"]
    records = [
        Record(f"{i}", "x" if i < 3 else "y", prompt, response)
        for i, (prompt, response) in enumerate(zip(prompts, expected, strict=True))
    ]
    table, samples = exact_match(dense, tokenizer, records, 12)
    assert table == {"x": {"exact": pytest.approx(2 / 3), "records": 3}, "y": {"exact": 0.0, "records": 1}}
    assert {sample.record.id: sample.exact for sample in samples} == {"0": True, "1": True, "2": False, "3": False}


def test_choose_spreads_over_the_records():
    records = [Record(str(i), "x" if i < 90 else "y", "p", "r") for i in range(100)]
    chosen = choose(records, 3)
    assert [record.id for record in chosen] == ["0", "30", "60", "90", "93", "96"]
    assert len(choose(records, 50)) == 60


def test_normalise_and_ends(dense, tokenizer):
    assert normalise(" a\n\n b\t c ") == "a b c"
    assert end_ids(dense, tokenizer) == {tokenizer.eos_token_id}


def test_no_chat_template_is_said(dense, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        generate(dense, bare, "cat")


def test_the_experts_are_those_of_the_positions_that_made_the_answer(moe, tokenizer):
    answer = generate(moe, tokenizer, "cat dog moon", 12)
    ids = torch.tensor([[*answer.prompt_ids, *answer.new_ids]])
    with torch.no_grad():
        logits_LTE = torch.stack(moe(input_ids=ids, output_router_logits=True).router_logits)
    first = len(answer.prompt_ids) - 1  # the position that reads the last prompt token writes the first new one
    made_LTE = logits_LTE[:, first : first + len(answer.new_ids)]
    counts = torch.bincount(made_LTE.argmax(-1).flatten(), minlength=4) / made_LTE[..., 0].numel()
    assert [share.first for share in answer.experts] == pytest.approx(counts.tolist())
    votes = made_LTE[..., :3].log_softmax(-1).sum(0).argmax(-1).tolist()
    assert [alignment for _, alignment in answer.pieces] == [THREE.alignments[v] for v in votes][: len(answer.pieces)]
