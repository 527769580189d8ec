"""Typed batches: balanced, packed, a function of (records, seed) alone, every record once an epoch."""

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.data.encode import IGNORE, PROMPT, RESPONSE, Encoded, collate
from h3scale.data.loader import TypedLoader, rows_of_rank
from h3scale.data.packing import pack
from h3scale.data.records import Record
from h3scale.errors import DataError

ALIGNMENTS = ("helpful", "harmless", "honest")


def make(counts: dict[str, int], lengths: tuple[int, ...] = (5, 9, 14)) -> list[Encoded]:
    encoded = []
    for alignment, count in counts.items():
        for i in range(count):
            length = lengths[i % len(lengths)]
            record = Record(f"{alignment}-{i}", alignment, "p", "r")
            encoded.append(Encoded(record, list(range(10, 10 + length)), length // 2))
    return encoded


def loader(encoded: list[Encoded], **options: object) -> TypedLoader:
    settings = {"seed": 1, "rows_per_batch": 4, "length": 32, **options}
    return TypedLoader(encoded, ALIGNMENTS, **settings)  # type: ignore[arg-type]


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(0, 5))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_record_comes_once_before_any_comes_twice(counts: tuple[int, ...], seed: int) -> None:
    encoded = make(dict(zip(ALIGNMENTS, counts, strict=True)))
    seen = [0] * len(encoded)
    for batch in islice(loader(encoded, seed=seed).batches(), 30):
        for row in batch.rows:
            for i in row:
                seen[i] += 1
        for alignment in ALIGNMENTS:
            mine = [n for n, item in zip(seen, encoded, strict=True) if item.record.alignment == alignment]
            assert max(mine) - min(mine) <= 1


def test_alignments_use_equally_many_tokens_whatever_their_numbers() -> None:
    encoded = make({"helpful": 300, "harmless": 20, "honest": 7})
    used: Counter[str] = Counter()
    for batch in islice(loader(encoded).batches(), 50):
        for row in batch.rows:
            for i in row:
                used[encoded[i].record.alignment] += len(encoded[i].input_ids)
        assert max(used.values()) - min(used.values()) <= 3 * 14
    by_record: Counter[str] = Counter(
        encoded[i].record.alignment
        for batch in islice(loader(encoded, balance="records").batches(), 50)
        for row in batch.rows
        for i in row
    )
    assert max(by_record.values()) - min(by_record.values()) <= 3


def test_no_row_overflows_and_little_is_wasted() -> None:
    encoded = make({a: 50 for a in ALIGNMENTS}, lengths=(3, 4, 5, 7, 11))
    total = 0
    for batch in islice(loader(encoded, length=64, rows_per_batch=8).batches(), 20):
        for row in batch.rows:
            tokens = sum(len(encoded[i].input_ids) for i in row)
            assert tokens <= 64
            total += tokens
    assert total > 0.97 * 20 * 8 * 64


def test_the_order_depends_on_the_seed_and_not_on_the_ranks() -> None:
    encoded = make({a: 30 for a in ALIGNMENTS})
    one, two, other = (list(islice(loader(encoded, seed=s).batches(), 5)) for s in (1, 1, 2))
    assert one == two != other
    for world_size, micro in ((1, 1), (2, 1), (2, 2), (4, 1)):
        dealt = [rows_of_rank(one[0], rank, world_size, micro) for rank in range(world_size)]
        assert len({len(part) for part in dealt}) == 1
        rows = [row for parts in zip(*dealt, strict=True) for part in parts for row in part]
        assert rows == one[0].rows


def test_counts_are_those_of_the_tensors() -> None:
    encoded = make({a: 30 for a in ALIGNMENTS}, lengths=(5, 9, 40))  # 40 is cut at 32
    for prompt_weight in (0.0, 0.25, 1.0):
        loading = loader(encoded, prompt_weight=prompt_weight)
        assert loading.num_cut == 30
        for batch in islice(loading.batches(), 10):
            tensors = loading.batch(batch.rows, pad_id=0)
            assert loading.targets_in(batch) == pytest.approx(tensors.target_weights.sum())
            assert torch.equal(tensors.targets == IGNORE, tensors.target_weights == 0)
            assert loading.tokens_in(batch) == (tensors.record_ids >= 0).sum()
            assert loading.tokens_in(batch, "prompt") == (tensors.roles == PROMPT).sum()
            assert loading.tokens_in(batch, "response") == (tensors.roles == RESPONSE).sum()


def test_targets_are_the_next_tokens_of_the_response_and_never_of_another_record() -> None:
    encoded = make({"helpful": 2}, lengths=(5, 6))
    batch = collate([[0, 1]], encoded, ALIGNMENTS, 12, pad_id=7)
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13, 14, 10, 11, 12, 13, 14, 15, 7]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]
    assert batch.targets[0].tolist() == [-100, 12, 13, 14, -100, -100, -100, 13, 14, 15, -100, -100]
    assert batch.record_ids[0].tolist() == [0] * 5 + [1] * 6 + [-1]


def test_an_alignment_whose_prompts_fill_the_row_is_refused() -> None:
    encoded = [*make({"helpful": 3, "harmless": 3}), Encoded(Record("x", "honest", "p", "r"), list(range(50)), 40)]
    with pytest.raises(DataError, match="alignment 'honest' has no records that fit into sequence_length = 32"):
        loader(encoded)


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(8, 64))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_packing_places_each_record_once_and_fills_no_row_over(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= capacity or len(row) == 1
    ideal = sum(min(length, capacity) for length in lengths) / capacity
    assert len(rows) <= 2 * ideal + 1
