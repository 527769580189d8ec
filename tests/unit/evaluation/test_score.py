"""The scores are those of plain transformers, record by record; the intervals cover; pairs see what single runs cannot."""

import json

import numpy as np
import pytest
import torch

from h3scale.data.encode import encode_records
from h3scale.data.records import Record
from h3scale.errors import DataError
from h3scale.evaluation import score as room
from h3scale.evaluation.evaluate import Options, evaluate_model
from h3scale.evaluation.score import RecordScore, bootstrap, by_alignment, paired_difference, score, summarise


def plain_loop(model, tokenizer, records):
    """Each record alone, in float64, written without any code of ours but the chat template."""
    model = type(model)(model.config).double().eval()
    model.load_state_dict(reference_state)
    model.set_experts_implementation("eager")
    sums = []
    for record in records:
        user = {"role": "user", "content": record.prompt}
        asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": record.response}], tokenize=False)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        first = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        sums.append(-sum(log_probs[t - 1, ids[0, t]].item() for t in range(first, ids.shape[1])))
    return sums


reference_state: dict = {}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scores_are_those_of_a_plain_float64_loop(kind, request, tokenizer, records):
    model = request.getfixturevalue(kind)
    reference_state.clear()
    reference_state.update({name: value.double() for name, value in model.state_dict().items()})
    found = score(model, tokenizer, records).records
    expected = plain_loop(model, tokenizer, records)
    assert [item.id for item in found] == [record.id for record in records]
    assert np.allclose([item.nll_sum / item.tokens for item in found], np.array(expected) / [i.tokens for i in found], atol=1e-5)
    assert max(expected) - min(expected) > 1  # a test that could not tell records apart would pass on anything


def test_packing_changes_nothing(dense, tokenizer, records, monkeypatch):
    packed = score(dense, tokenizer, records).records
    alone = [score(dense, tokenizer, [record]).records[0] for record in records]
    monkeypatch.setattr(room, "BATCH_TOKENS", 1)
    one_row_at_a_time = score(dense, tokenizer, records).records
    for other in (alone, one_row_at_a_time):
        assert [item.tokens for item in other] == [item.tokens for item in packed]
        assert np.allclose([item.nll_sum for item in other], [item.nll_sum for item in packed], atol=1e-5)


def test_two_runs_give_the_same_json(moe, tokenizer, records):
    encoded = encode_records(tokenizer, records)
    options = Options(generate=2, exclude_sources=("template",))
    first, second = (json.dumps(evaluate_model(moe, tokenizer, encoded, options)[0]) for _ in range(2))
    assert first == second


def test_long_records_are_cut_and_counted(dense, tokenizer):
    long_response = Record("a", "helpful", "cat", "dog " * 100)
    long_prompt = Record("b", "helpful", "cat " * 100, "dog")
    scores = score(dense, tokenizer, [long_response, long_prompt, Record("c", "helpful", "cat", "dog")])
    assert [item.id for item in scores.records] == ["a", "c"]
    assert scores.kept == [0, 2]
    assert scores.records[0].tokens == dense.config.max_position_embeddings - 4  # <user> cat <end> <assistant>
    assert scores.notes == ["2 of 3 records were cut to the model's 64 tokens", "1 records were left out: no response token fits"]


def test_summary_weighs_tokens_not_records():
    table = summarise([RecordScore("a", "x", 10.0, 10), RecordScore("b", "x", 0.0, 30), RecordScore("c", "y", 6.0, 3)])
    assert table["x"]["nll"] == pytest.approx(0.25)
    assert table["x"]["low"] < 0.25 < table["x"]["high"]
    assert (table["x"]["records"], table["x"]["tokens"]) == (2, 40)
    assert table["y"]["low"] == table["y"]["high"] == table["y"]["nll"] == 2.0


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        tokens = rng.integers(5, 50, 60).astype(float)
        sums = tokens * (2 + rng.normal(0, 0.5, 60))
        interval = bootstrap(sums, tokens, resamples=300)
        hits += interval.low <= 2 <= interval.high
    assert 0.88 <= hits / 300 <= 0.99


def test_bootstrap_is_seeded_and_bounded_in_memory(monkeypatch):
    sums, tokens = np.arange(50.0), np.full(50, 2.0)
    assert bootstrap(sums, tokens) == bootstrap(sums, tokens)
    assert bootstrap(sums, tokens) != bootstrap(sums, tokens, seed=1)


def pair(shift, noise, seed=0, alignments=("x", "y")):
    rng = np.random.default_rng(seed)
    a, b = [], []
    for i in range(200):
        tokens, hard = int(rng.integers(5, 50)), rng.normal(3, 1)
        values = hard, hard + shift + rng.normal(0, noise)
        for scores, value in zip((a, b), values, strict=True):
            scores.append(RecordScore(str(i), alignments[i % len(alignments)], value * tokens, tokens))
    return a, b


def test_paired_difference_sees_what_two_intervals_do_not():
    a, b = pair(shift=0.05, noise=0.1)
    difference = paired_difference(a, b)
    assert difference.high < 0
    assert difference.excludes_zero
    separate = summarise(a)["x"], summarise(b)["x"]
    assert separate[0]["high"] > separate[1]["low"]  # the single intervals overlap


def test_paired_difference_is_the_mean_over_alignments_and_antisymmetric():
    a, b = pair(shift=0.5, noise=0.1)
    tables = [summarise(scores) for scores in (a, b)]
    means = [np.mean([entry["nll"] for entry in table.values()]) for table in tables]
    assert paired_difference(a, b).mean == pytest.approx(means[0] - means[1])
    assert paired_difference(b, a).mean == pytest.approx(-paired_difference(a, b).mean)
    only_x = by_alignment(a)["x"], by_alignment(b)["x"]
    assert paired_difference(*only_x).mean == pytest.approx(tables[0]["x"]["nll"] - tables[1]["x"]["nll"])


def test_paired_difference_of_equals_does_not_exclude_zero():
    excluded = sum(paired_difference(*pair(0, 0.3, seed), resamples=300).excludes_zero for seed in range(40))
    assert excluded <= 6


def test_records_of_one_prompt_are_drawn_together():
    def made(group):
        values = np.random.default_rng(0).normal(2, 0.3, 40).repeat(3)  # three answers to each prompt, as likely
        return [RecordScore(str(i), "x", 10 * v, 10, group=group(i)) for i, v in enumerate(values.tolist())]

    apart, together = (summarise(made(group))["x"] for group in (lambda i: None, lambda i: i // 3))
    assert apart["nll"] == pytest.approx(together["nll"])
    assert together["high"] - together["low"] == pytest.approx(3**0.5 * (apart["high"] - apart["low"]), rel=0.15)
    zero = [RecordScore(item.id, "x", 0.0, 10, group=item.group) for item in made(lambda i: i // 3)]
    difference = paired_difference(made(lambda i: i // 3), zero)
    assert (difference.low, difference.high) == pytest.approx((together["low"], together["high"]), rel=0.02)


def test_paired_difference_refuses_other_records():
    a, b = pair(0, 0.1)
    with pytest.raises(DataError, match="not scored on the same records"):
        paired_difference(a, b[::-1])


def test_bootstrap_resamples_the_ratio_not_a_mean_of_ratios():
    """One long easy record in ten: the mean over tokens is far from the mean over records, and so is its interval."""
    tokens = np.array([1000.0 if i % 10 == 0 else 1.0 for i in range(100)])
    interval = bootstrap(np.where(tokens > 1, tokens * 1.0, tokens * 5.0), tokens)
    assert interval.mean == pytest.approx(10_450 / 10_090)
    assert interval.high < 1.2
