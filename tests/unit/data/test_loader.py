"""The loader: counts without tensors, ranks that only share out rows, any step at once, a state of a step."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from h3scale.config.data import Data
from h3scale.data.collate import IGNORE, PADDING, PROMPT, RESPONSE
from h3scale.data.encode import Encoded
from h3scale.data.loader import MicroBatches, TypedLoader, rows_of_rank
from h3scale.data.packing import pack
from h3scale.data.records import Record
from h3scale.data.store import Tokens
from h3scale.errors import ConfigError, DataError

ALIGNMENTS = ("helpful", "harmless", "honest")


def make(counts: dict[str, int], lengths: tuple[int, ...] = (5, 9, 14)) -> Tokens:
    encoded = []
    for alignment, count in counts.items():
        for i in range(count):
            length = lengths[i % len(lengths)]
            record = Record(f"{alignment}-{i}", alignment, "p", "r")
            encoded.append(Encoded.of(record, list(range(10, 10 + length)), length // 2))
    return Tokens.of(encoded, ALIGNMENTS)


def loader(records: Tokens, seed: int = 1, steps: int | None = None, **settings: object) -> TypedLoader:
    data = Data.model_validate({"records": ["x"], "rows_per_batch": 4, "sequence_length": 32, **settings})
    return TypedLoader(records, data, seed=seed, steps=steps)


def test_alignments_use_equally_many_tokens_whatever_their_numbers() -> None:
    loading = loader(make({"helpful": 300, "harmless": 20, "honest": 7}))
    used = np.zeros(3)
    for step in range(50):
        used += loading.tokens_by_alignment(loading.batch(step))
        assert used.max() - used.min() <= 3 * 14


def test_weights_and_temperature_set_the_shares() -> None:
    records = make({"helpful": 320, "harmless": 160, "honest": 20}, lengths=(8,))

    def shares(**settings: object) -> list[float]:
        loading = loader(records, **settings)
        used = sum(loading.tokens_by_alignment(loading.batch(step)) for step in range(60))
        return (used / used.sum()).round(2).tolist()

    assert shares() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert shares(weights={"helpful": 3, "harmless": 1, "honest": 0}) == [0.75, 0.25, 0]
    assert shares(temperature=1.0) == pytest.approx([0.64, 0.32, 0.04], abs=0.01)
    root = np.sqrt([320, 160, 20])
    assert shares(temperature=2.0) == pytest.approx((root / root.sum()).tolist(), abs=0.01)


@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 3), (3, 4)]), st.sampled_from(["mixed", "separate"]), st.integers(0, 9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_ranks_share_out_the_rows_and_nothing_else(topology: tuple[int, int], packing: str, seed: int) -> None:
    world_size, rows_per_micro_batch = topology
    loading = loader(make({a: 30 for a in ALIGNMENTS}), seed, packing=packing, rows_per_batch=24)
    for step in range(3):
        batch = loading.batch(step)
        dealt = [rows_of_rank(batch, rank, world_size, rows_per_micro_batch) for rank in range(world_size)]
        assert {(len(part), *map(len, part)) for part in dealt} == {(len(dealt[0]), *[rows_per_micro_batch] * len(dealt[0]))}
        rows = Counter(tuple(row.tolist()) for part in dealt for micro_batch in part for row in micro_batch)
        assert rows == Counter(tuple(row.tolist()) for row in batch.rows)


@given(st.lists(st.floats(0.1, 1), min_size=3, max_size=3), st.integers(0, 99), st.sampled_from([1, 2, 4, 8]), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_micro_batch_misses_a_share_by_a_row(weights: list[float], seed: int, rows_per_micro_batch: int, mixed: bool) -> None:
    generator = np.random.default_rng(seed)
    lengths = tuple(np.clip(generator.lognormal(3, 0.6, 97), 4, 90).astype(int).tolist())
    loading = loader(
        make({"helpful": 500, "harmless": 300, "honest": 90}, lengths),
        seed,
        sequence_length=256,
        rows_per_batch=16,
        packing="mixed" if mixed else "separate",
        weights=dict(zip(ALIGNMENTS, weights, strict=True)),
    )
    shares = np.array(weights) / sum(weights)
    for step in range(20):
        for micro_batch in rows_of_rank(loading.batch(step), 0, 1, rows_per_micro_batch):
            ids = np.concatenate(micro_batch)
            tokens = np.bincount(loading.records.labels[ids], loading.kept[ids], 3)
            assert (np.abs(tokens - shares * rows_per_micro_batch * 256) < 256).all()


def test_a_thousand_ranks_see_what_one_sees() -> None:
    loading = loader(make({"helpful": 900, "harmless": 500, "honest": 80}), rows_per_batch=1024)
    whole = loading.batch(2)
    for world_size in (1, 2, 4, 64, 1024):
        parts = [rows_of_rank(whole, rank, world_size, 1) for rank in range(world_size)]
        assert sum(len(part) for part in parts) == 1024
        in_order = [parts[i % world_size][i // world_size][0] for i in range(1024)]
        assert all(np.array_equal(a, b) for a, b in zip(in_order, whole.rows, strict=True))


def test_any_step_can_be_had_at_once_and_from_several_threads() -> None:
    records = make({a: 50 for a in ALIGNMENTS})
    forward = loader(records).batch(600).rows
    loading = loader(records)
    for step in (0, 599, 3, 600, 7):
        assert len(loading.batch(step).rows) == 4
    assert all(np.array_equal(a, b) for a, b in zip(forward, loading.batch(600).rows, strict=True))
    one = loader(records, steps=40)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: one.batch(step).records.tolist(), range(40)))
    assert found == [loader(records).batch(step).records.tolist() for step in range(40)]


def test_counts_are_those_of_the_tensors() -> None:
    records = make({a: 30 for a in ALIGNMENTS}, lengths=(5, 9, 40))  # 40 is cut at 32
    for prompt_weight in (0.0, 0.25, 1.0):
        loading = loader(records, prompt_weight=prompt_weight)
        assert loading.num_cut == 30
        for step in range(10):
            batch = loading.batch(step)
            tensors = loading.tensors(batch.rows, pad_id=0)
            assert loading.targets_in(batch) == pytest.approx(tensors.target_weights.sum())
            assert torch.equal(tensors.targets == IGNORE, tensors.target_weights == 0)
            assert loading.tokens_in(batch) == (tensors.record_ids >= 0).sum()
            assert loading.tokens_in(batch, "prompt") == (tensors.roles == PROMPT).sum()
            assert loading.tokens_in(batch, "response") == (tensors.roles == RESPONSE).sum()
            for a, count in enumerate(loading.tokens_by_alignment(batch)):
                assert count == (tensors.alignment_ids == a).sum()
            assert torch.equal(tensors.roles == PADDING, tensors.alignment_ids == -1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_number_of_dataloader_workers_gives_the_same(num_workers: int) -> None:
    loading = loader(make({a: 30 for a in ALIGNMENTS}), steps=12)
    mine = MicroBatches(loading, 1, 2, 2, steps=12, start_step=3)
    assert len(mine) == 9
    found = [batch.record_ids for batch in DataLoader(mine, batch_size=None, num_workers=num_workers)]
    for step, ids in enumerate(found, start=3):
        expected = loading.tensors(rows_of_rank(loading.batch(step), 1, 2, 2)[0], 0).record_ids
        assert torch.equal(ids, expected)


def test_rows_that_cannot_be_shared_out_evenly_are_refused() -> None:
    loading = loader(make({a: 30 for a in ALIGNMENTS}), rows_per_batch=10)
    with pytest.raises(ConfigError, match="rows_per_batch = 10 is no multiple of 4 ranks x 1 rows"):
        MicroBatches(loading, 0, 4, 1, steps=3)


def test_the_state_is_a_step_and_another_order_is_refused() -> None:
    records = make({a: 30 for a in ALIGNMENTS})
    loading = loader(records)
    state = loading.state(17)
    assert loader(records).resume(state) == 17
    for other in (
        loader(records, seed=2),
        loader(records, sequence_length=64),
        loader(records, packing="separate"),
        loader(records, weights={"helpful": 2, "harmless": 1, "honest": 1}),
        loader(make({a: 31 for a in ALIGNMENTS})),
    ):
        with pytest.raises(DataError, match=r"the run was at step 17 of the order [0-9a-f]{16}, but these records"):
            other.resume(state)


def test_what_the_steps_need_and_the_records_do_not_give_is_said_at_once() -> None:
    records = make({a: 8 for a in ALIGNMENTS}, lengths=(16,))
    with pytest.raises(DataError, match=r"the records last for 9 of 100 steps: .* \(works: steps = 9 or fewer"):
        loader(records, steps=100, max_epochs=3.0)
    assert loader(records, steps=9, max_epochs=3.0).plan.num_rows == 36


def test_weights_must_name_what_is_there() -> None:
    with pytest.raises(ConfigError) as error:
        loader(make({a: 3 for a in ALIGNMENTS}), weights={"helpful": 1, "harmful": 1}, max_epochs={"hones": 2.0})
    assert error.value.findings == [
        "data.max_epochs: 'hones' has no records (works: helpful, harmless, honest)",
        "data.weights: from step 0: 'harmful' has no records (works: helpful, harmless, honest)",
        "data.weights: from step 0: no weight for 'harmless' (0 leaves it out)",
        "data.weights: from step 0: no weight for 'honest' (0 leaves it out)",
    ]


def test_an_alignment_whose_prompts_fill_the_row_is_refused() -> None:
    prompts = {"helpful": 10, "harmless": 10, "honest": 40}
    records = Tokens.of([Encoded.of(Record(a, a, "p", "r"), list(range(50)), n) for a, n in prompts.items()], ALIGNMENTS)
    with pytest.raises(DataError, match="alignment 'honest' has no records that fit into sequence_length = 32"):
        loader(records)


def test_too_many_overlong_prompts_are_an_error_and_few_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoded = [Encoded.of(Record(str(i), a, "p", "r"), list(range(20)), 10) for i in range(50) for a in ALIGNMENTS]
    encoded.append(Encoded.of(Record("x", "honest", "p", "r"), list(range(50)), 40))
    records = Tokens.of(encoded, ALIGNMENTS)
    loader(records).check_lengths()
    with pytest.raises(DataError, match=r"1 of 151 records are left out: .* and data.max_bad is 0.10% \(works: a longer"):
        loader(records, max_bad=0.001).check_lengths()
    with pytest.raises(DataError, match=r"data\.bad_records is stop"):
        loader(records, bad_records="stop").check_lengths()


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(8, 64))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_packing_places_each_record_once_and_fills_no_row_over(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= capacity or len(row) == 1
    ideal = sum(min(length, capacity) for length in lengths) / capacity
    assert len(rows) <= 2 * ideal + 1
