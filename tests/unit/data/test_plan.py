"""The planner: rows are full, shares hold, every record once an epoch, the same from any start."""

import hashlib
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.config.data import Data
from h3scale.data.mixture import Mixture, mixture
from h3scale.data.plan import make_plan, open_plan
from h3scale.data.planner import Planner, shuffled

NAMES = ("helpful", "harmless", "honest")


def lognormal(count: int, seed: int = 0, low: int = 8, high: int = 300) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4.5, 0.6, count).astype(np.int64), low, high)


def of(shares: list[float], limits: list[int] | None = None) -> Mixture:
    values = np.array(shares, np.float64)
    return Mixture(NAMES[: len(shares)], ((0, values / values.sum()),), np.array(limits or [-1] * len(shares), np.int64))


def planner(lengths: np.ndarray, labels: np.ndarray, shares: list[float], capacity: int, **options) -> Planner:
    limits = options.pop("limits", None)
    return Planner(np.minimum(lengths, capacity), labels, of(shares, limits), capacity=capacity, **{"seed": 0, **options})


cases = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),  # records of each alignment
    st.integers(20, 90),  # capacity
    st.integers(1, 6),  # rows a batch
    st.booleans(),
    st.integers(0, 2**32),
)


@given(cases, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_fit_and_no_record_comes_again_before_all_others_of_its_alignment_came(case, data) -> None:
    counts, capacity, rows_per_batch, separate, seed = case
    lengths = np.array(data.draw(st.lists(st.integers(1, 100), min_size=sum(counts), max_size=sum(counts))))
    labels = np.repeat(np.arange(len(counts)), counts)
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=len(counts)))
    plan = planner(lengths, labels, weights, capacity, separate=separate, seed=seed)
    seen = np.zeros(len(lengths), int)
    for rows in islice(plan.batches(rows_per_batch), 12):
        assert len(rows) == rows_per_batch
        for row in rows:
            assert len(row)
            assert np.minimum(lengths[row], capacity).sum() <= capacity
            assert not separate or len(set(labels[row].tolist())) == 1
            np.add.at(seen, row, 1)
            for a in range(len(counts)):
                mine = seen[labels == a]
                assert mine.max() - mine.min() <= 1


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=3), st.integers(0, 1000), st.integers(1, 8))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_rows_of_one_alignment_never_miss_their_share_by_a_row(weights, seed, micro_batches) -> None:
    rows_per_micro_batch = 4
    count = micro_batches * rows_per_micro_batch
    lengths, labels = lognormal(3000, seed), np.arange(3000) % len(weights)
    shares = np.array(weights) / sum(weights)
    plan = planner(lengths, labels, weights, 600, separate=True, seed=seed)
    for rows in islice(plan.batches(count), 10):
        kinds = np.array([labels[row[0]] for row in rows])
        for micro_batch in range(micro_batches):
            dealt = kinds[micro_batch::micro_batches]  # as loader.rows_of_rank deals them
            found = np.bincount(dealt, minlength=len(weights))
            assert (np.abs(found - shares * rows_per_micro_batch) < 1 + 1e-6).all()


@pytest.mark.parametrize(("capacity", "waste", "distance"), [(2048, 5e-4, 0.02), (4096, 5e-4, 0.01)])
def test_long_rows_are_full_and_hold_the_shares_in_every_batch(capacity: int, waste: float, distance: float) -> None:
    lengths = lognormal(40_000)
    labels = np.random.default_rng(1).choice(3, len(lengths), p=[0.7, 0.25, 0.05])
    shares = np.array([0.5, 0.3, 0.2])
    used, distances, rows_seen = 0, [], 0
    for rows in islice(planner(lengths, labels, shares.tolist(), capacity).batches(8), 100):
        ids = np.concatenate(rows)
        tokens = np.bincount(labels[ids], lengths[ids], 3)
        distances.append(np.abs(tokens / tokens.sum() - shares).sum() / 2)
        used += tokens.sum()
        rows_seen += 8
        for row in rows:  # and every row holds every alignment in its share, to within two records
            found = np.bincount(labels[row], lengths[row], 3)
            assert (np.abs(found - shares * capacity) < 2 * 300).all()
    assert 1 - used / (rows_seen * capacity) < waste
    assert np.mean(distances) < distance
    assert np.quantile(distances, 0.95) < 2 * distance


def test_the_order_does_not_depend_on_how_far_one_plans() -> None:
    lengths, labels = lognormal(500), np.arange(500) % 3
    short = make_plan(planner(lengths, labels, [1, 1, 1], 512), 4, 5)
    long = make_plan(planner(lengths, labels, [1, 1, 1], 512), 4, 50)
    assert np.array_equal(long.records[: len(short.records)], short.records)
    other = make_plan(planner(lengths, labels, [1, 1, 1], 512, seed=1), 4, 5)
    assert not np.array_equal(short.records[:20], other.records[:20])


def test_the_shuffle_is_a_permutation_that_never_changes() -> None:
    for count in (0, 1, 2, 1000):
        assert sorted(shuffled(count, 1, 2, 3).tolist()) == list(range(count))
    assert shuffled(8, 0, 0, 0).tolist() == [2, 1, 5, 7, 0, 3, 4, 6]  # pinned: another order is another ORDER in loader.py
    assert shuffled(8, 0, 0, 1).tolist() != shuffled(8, 0, 1, 0).tolist()
    places = np.array([np.flatnonzero(shuffled(10, seed) == 0)[0] for seed in range(3000)])
    assert (np.abs(np.bincount(places, minlength=10) / 300 - 1) < 0.25).all()


def test_an_alignment_stops_at_its_last_epoch_and_its_share_goes_to_the_others() -> None:
    lengths = np.full(300, 16)
    labels = np.repeat([0, 1, 2], [140, 140, 20])
    plan = planner(lengths, labels, [1, 1, 1], 64, limits=[-1, -1, 50])  # 2.5 epochs of 20
    seen = np.zeros(300, int)
    shares = []
    for rows in islice(plan.batches(6), 40):
        ids = np.concatenate(rows)
        np.add.at(seen, ids, 1)
        shares.append(np.bincount(labels[ids], minlength=3) / len(ids))
    assert seen[labels == 2].sum() == 50
    assert seen[labels == 2].max() == 3
    ((step, name),) = plan.ended
    assert name == "honest"
    assert np.abs(shares[step - 1] - 1 / 3).max() < 0.1
    assert np.abs(shares[step + 1] - [0.5, 0.5, 0]).max() < 0.1


def test_the_plan_ends_when_everything_has_reached_its_last_epoch() -> None:
    plan = make_plan(planner(np.full(40, 16), np.arange(40) % 2, [1, 1], 64, limits=[20, 20]), 2, 100)
    assert plan.num_rows == 10
    assert sorted(plan.records.tolist()) == list(range(40))


def test_a_schedule_changes_the_shares_at_its_step() -> None:
    lengths, labels = lognormal(5000), np.arange(5000) % 3
    data = Data.model_validate(
        {
            "records": ["x"],
            "schedule": [
                {"from_step": 0, "weights": {"helpful": 1, "harmless": 0, "honest": 0}},
                {"from_step": 10, "weights": {"helpful": 1, "harmless": 1, "honest": 2}},
            ],
        }
    )
    counts = np.bincount(labels)
    mixed = mixture(data, NAMES, counts, counts)
    plan = Planner(lengths, labels, mixed, capacity=2048, seed=0)
    for step, rows in enumerate(islice(plan.batches(4), 20)):
        ids = np.concatenate(rows)
        tokens = np.bincount(labels[ids], lengths[ids], 3)
        expected = [1, 0, 0] if step < 10 else [0.25, 0.25, 0.5]
        if step != 10:
            assert np.abs(tokens / tokens.sum() - expected).max() < 0.05


def test_a_written_plan_is_the_one_in_memory_and_longer_ones_stand_beside_it(tmp_path) -> None:
    lengths, labels = lognormal(500), np.arange(500) % 3
    memory = make_plan(planner(lengths, labels, [1, 1, 1], 512), 4, 30)
    assert open_plan(tmp_path / "plan", 10) is None
    make_plan(planner(lengths, labels, [1, 1, 1], 512), 4, 10, tmp_path / "plan")
    assert open_plan(tmp_path / "plan", 30) is None
    disk = make_plan(planner(lengths, labels, [1, 1, 1], 512), 4, 30, tmp_path / "plan")
    again = open_plan(tmp_path / "plan", 11)
    assert again
    for plan in (disk, again):
        assert np.array_equal(plan.records, memory.records)
        assert np.array_equal(plan.row_starts, memory.row_starts)
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["10", "30"]
    assert len(open_plan(tmp_path / "plan", 10).row_starts) == 41  # the shortest that is long enough


def test_records_that_need_a_whole_row_each_and_tiny_ones_pack_together() -> None:
    lengths = np.array([100] * 30 + [3] * 300)
    labels = np.array([0] * 30 + [1] * 300)
    rows = [row for rows in islice(planner(lengths, labels, [9, 1], 100).batches(4), 8) for row in rows]
    assert all(lengths[row].sum() <= 100 for row in rows)
    tokens = np.bincount(np.concatenate([labels[row] for row in rows]), np.concatenate([lengths[row] for row in rows]))
    assert abs(tokens[0] / tokens.sum() - 0.9) < 0.05


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "28045eb9c7cbe68c"), ({"separate": True}, "4aea7bbad2bc858f"), ({"limits": [-1, 90, 40]}, "dc486bd05c41dab7")],
)
def test_the_order_never_changes(options: dict, expected: str) -> None:
    """Pinned: a planner that gives another order needs another ORDER in loader.py."""
    lengths = 5 + (np.arange(300) * 7919) % 83
    plan = make_plan(planner(lengths, np.arange(300) % 3, [3, 2, 1], 256, **options), 4, 40)
    assert hashlib.sha256(plan.records.tobytes() + plan.row_starts.tobytes()).hexdigest()[:16] == expected


def test_planning_is_linear_in_the_records() -> None:
    """Not a benchmark: a planner that searched all waiting records would be slower by orders of magnitude."""
    began = time.process_time()
    lengths, labels = lognormal(50_000), np.arange(50_000) % 3
    for _ in islice(planner(lengths, labels, [1, 1, 1], 2048).batches(8), 300):
        pass
    assert time.process_time() - began < 5
