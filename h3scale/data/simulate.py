"""The order of a run replayed for ranks that are not there: who gets what, and whether everything is given out once.

Shape suffixes: N ranks, A alignments, M micro-batches of one rank in one step, R rows of one micro-batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h3scale.data.inspect_plan import rows_by_alignment
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.data.store import Store
from h3scale.errors import UsageError
from h3scale.log import progress

MAX_FAULTS = 20  # named; the others are counted


@dataclass(frozen=True)
class Simulation:
    """faults: what is wrong with the order, one line each. order: sha256 of the record numbers, row by row, of all steps.

    tokens_NA: tokens of each rank and alignment over all steps. fewest_A, most_A: of an alignment in any micro-batch;
    fewest, most: of all alignments together. imbalance_rows: by how many rows a micro-batch has too much or too little
    of an alignment, at worst; rank_spread: the largest difference between two ranks' tokens in one step, as a share of
    the mean.
    """

    ranks: int
    steps: int
    faults: list[str]
    order: str
    tokens_NA: np.ndarray
    fewest_A: np.ndarray
    most_A: np.ndarray
    fewest: int
    most: int
    imbalance_rows: float
    rank_spread: float

    def as_json(self) -> dict[str, Any]:
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}


def check_ranks(ranks: int, rows_per_batch: int, rows_per_micro_batch: int) -> None:
    """Raises UsageError (2) for a number of ranks whose micro-batches do not make up the global batch."""
    count = rows_per_batch // rows_per_micro_batch
    if ranks >= 1 and rows_per_batch % (ranks * rows_per_micro_batch) == 0:
        return
    works = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: not a number of ranks (works: {works})")
    together = ranks * rows_per_micro_batch
    raise UsageError(
        f"--ranks {ranks}: {ranks} x rows_per_micro_batch = {rows_per_micro_batch} does not divide data.rows_per_batch = "
        f"{rows_per_batch} (works: {works}; or data.rows_per_batch={-(-rows_per_batch // together) * together})"
    )


def check_steps(steps: int, run_steps: int) -> None:
    """Raises UsageError (2) for more steps than the run has."""
    if not 1 <= steps <= run_steps:
        more = f", or steps={steps}" if steps > run_steps else ""
        raise UsageError(f"--simulate {steps}: the run has {run_steps} steps (works: 1 to {run_steps}{more})")


def simulate(loader: TypedLoader, ranks: int, steps: int, rows_per_micro_batch: int) -> Simulation:
    """Replays the first steps for so many ranks, with the function that deals out rows in training.

    Raises as check_ranks and check_steps do.
    """
    rows_per_batch = loader.data.rows_per_batch
    check_ranks(ranks, rows_per_batch, rows_per_micro_batch)
    check_steps(steps, steps if loader.steps is None else loader.steps)
    faults = _Faults()
    sums = _Sums(loader, ranks)
    digest = hashlib.sha256()
    with progress("simulate", steps * ranks, "ranks") as bar:
        for step in range(steps):
            batch = loader.batch(step)
            digest.update(np.array([len(row) for row in batch.rows], "<u4").tobytes())
            digest.update(batch.records.astype("<u4").tobytes())
            rows_NMR = _dealt(batch, step, ranks, rows_per_micro_batch, faults)
            if rows_NMR is not None:
                sums.add(step, rows_NMR)
            bar.advance(ranks)
    _check_epochs(loader, steps, faults)
    return Simulation(
        ranks, steps, faults.lines(), digest.hexdigest(), sums.tokens_NA, sums.fewest_A, sums.most_A, sums.fewest, sums.most,
        sums.imbalance_rows, sums.rank_spread,
    )  # fmt: skip


class _Faults:
    """Lines, the first MAX_FAULTS of them kept."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_FAULTS:
            self.shown.append(line)

    def lines(self) -> list[str]:
        more = self.count - len(self.shown)
        return [*self.shown, f"and {more:,} more"] if more else self.shown


class _Sums:
    """Tokens of ranks and micro-batches, step by step."""

    def __init__(self, loader: TypedLoader, ranks: int):
        size = len(loader.alignments)
        self.loader = loader
        self.tokens_NA = np.zeros((ranks, size), np.int64)
        self.fewest_A, self.most_A = np.full(size, np.iinfo(np.int64).max), np.zeros(size, np.int64)
        self.fewest, self.most = int(np.iinfo(np.int64).max), 0
        self.imbalance_rows = self.rank_spread = 0.0

    def add(self, step: int, rows_NMR: np.ndarray) -> None:
        rows = self.loader.data.rows_per_batch
        tokens_NMA = rows_by_alignment(self.loader, step * rows, (step + 1) * rows)[0][rows_NMR].sum(2)
        tokens_NM = tokens_NMA.sum(2)
        self.tokens_NA += tokens_NMA.sum(1)
        self.fewest_A = np.minimum(self.fewest_A, tokens_NMA.min((0, 1)))
        self.most_A = np.maximum(self.most_A, tokens_NMA.max((0, 1)))
        self.fewest, self.most = min(self.fewest, int(tokens_NM.min())), max(self.most, int(tokens_NM.max()))
        # Against the batch's own shares: what the ranks are dealt is judged here, not what the planner made.
        share_A = tokens_NMA.sum((0, 1)) / tokens_NM.sum()
        worst = float(np.abs(tokens_NMA - share_A * tokens_NM[:, :, None]).max()) / self.loader.length
        self.imbalance_rows = max(self.imbalance_rows, worst)
        tokens_N = tokens_NM.sum(1)
        self.rank_spread = max(self.rank_spread, float((tokens_N.max() - tokens_N.min()) / tokens_N.mean()))


def _dealt(batch: GlobalBatch, step: int, ranks: int, rows_per_micro_batch: int, faults: _Faults) -> np.ndarray | None:
    """(N, M, R): numbers of the rows that each rank is dealt; None, and faults, where these are not the batch, each row once."""
    number_of = {id(row): i for i, row in enumerate(batch.rows)}
    dealt = [rows_of_rank(batch, rank, ranks, rows_per_micro_batch) for rank in range(ranks)]
    numbers = [[[number_of.get(id(row), -1) for row in part] for part in parts] for parts in dealt]
    before = faults.count
    per_rank = len(batch.rows) // (ranks * rows_per_micro_batch)
    owners: list[list[int]] = [[] for _ in batch.rows]
    for rank, parts in enumerate(numbers):
        if [len(part) for part in parts] != [rows_per_micro_batch] * per_rank:
            sizes = ", ".join(str(len(part)) for part in parts)
            faults.add(
                f"step {step}: rank {rank} is dealt micro-batches of {sizes or 'no'} rows, not {per_rank} of {rows_per_micro_batch}"
            )
        for row in (row for part in parts for row in part):
            if row < 0:
                faults.add(f"step {step}: rank {rank} is dealt a row that is not in the global batch")
            else:
                owners[row].append(rank)
    for row, ranks_of_row in enumerate(owners):
        if len(ranks_of_row) != 1:
            faults.add(f"step {step}: row {row} is dealt to {_named(ranks_of_row)}")
    return np.array(numbers) if faults.count == before else None


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "no rank"
    if len(set(ranks)) == 1:
        return f"rank {ranks[0]} {len(ranks)} times"
    return f"ranks {', '.join(str(rank) for rank in ranks)}"


def _check_epochs(loader: TypedLoader, steps: int, faults: _Faults) -> None:
    """A record comes again only when all others of its alignment have come: uses in order are whole epochs, then a part."""
    rows = steps * loader.data.rows_per_batch
    ids = np.asarray(loader.plan.records[: loader.plan.row_starts[rows]], np.int64)
    for record in np.unique(ids[~loader.usable[ids]]).tolist():
        faults.add(f"{_place(loader, record)} is dealt, but is not one of the run's records")
    labels = loader.records.labels[ids]
    for a, name in enumerate(loader.alignments):
        mine = ids[labels == a]
        keys = np.sort(np.arange(len(mine)) // loader.records_A[a] * len(loader.records) + mine)
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]).tolist():
            epoch, record = divmod(key, len(loader.records))
            faults.add(f"{_place(loader, record)} ({name}) comes more than once in epoch {epoch}")


def _place(loader: TypedLoader, record: int) -> str:
    return loader.records.where(record) if isinstance(loader.records, Store) else f"record {record}"
