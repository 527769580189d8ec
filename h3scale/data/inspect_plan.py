"""The plan of a run in numbers: shares, padding and epochs of every global batch, without reading a record.

Shape suffixes: A alignments, S steps, U uses of records, R rows, M micro-batches, P stretches of steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank

CHUNK = 4_000_000  # uses of records that are looked at together: some hundred megabytes
POINTS = 100  # a longer run is drawn as so many stretches


@dataclass(frozen=True)
class PlanNumbers:
    """All global batches of a run. tokens_SA, uses_SA: tokens and records of each alignment in each step, int64.

    planned_SA: the shares of the recipe, of those alignments that have not ended. micro_batch_rows_S: by how many rows
    the worst micro-batch of a step has too much or too little of an alignment. ended: step at which an alignment
    reaches data.max_epochs.
    """

    alignments: tuple[str, ...]
    rows_per_batch: int
    sequence_length: int
    rows_per_micro_batch: int
    records_A: np.ndarray
    tokens_SA: np.ndarray
    uses_SA: np.ndarray
    planned_SA: np.ndarray
    micro_batch_rows_S: np.ndarray
    ended: dict[str, int]

    @property
    def steps(self) -> int:
        return len(self.tokens_SA)

    @property
    def positions(self) -> int:
        """Tokens that a global batch has room for."""
        return self.rows_per_batch * self.sequence_length

    @cached_property
    def tokens_S(self) -> np.ndarray:
        return self.tokens_SA.sum(1)

    @cached_property
    def share_SA(self) -> np.ndarray:
        return self.tokens_SA / self.tokens_S[:, None]

    @cached_property
    def distance_S(self) -> np.ndarray:
        """Total variation distance of each global batch from its planned shares."""
        return np.abs(self.share_SA - self.planned_SA).sum(1) / 2

    @cached_property
    def waste_S(self) -> np.ndarray:
        """Share of padding."""
        return 1 - self.tokens_S / self.positions

    @cached_property
    def epochs_SA(self) -> np.ndarray:
        """How often each alignment's records have been used after each step."""
        return np.cumsum(self.uses_SA, 0) / self.records_A

    @property
    def realised_A(self) -> np.ndarray:
        return self.tokens_SA.sum(0) / self.tokens_SA.sum()

    @property
    def planned_A(self) -> np.ndarray:
        """Shares of the whole run that the realised ones are to be held against."""
        return (self.planned_SA * self.tokens_S[:, None]).sum(0) / self.tokens_S.sum()

    @property
    def off_A(self) -> np.ndarray:
        """The largest difference between a planned and a realised share in any step."""
        return np.abs(self.share_SA - self.planned_SA).max(0)

    def as_json(self) -> dict[str, Any]:
        """The numbers of the whole run."""
        distance = self.distance_S
        rows = zip(self.planned_A, self.realised_A, self.off_A, self.uses_SA.sum(0), self.epochs_SA[-1], strict=True)
        return {
            "steps": self.steps,
            "rows_per_batch": self.rows_per_batch,
            "sequence_length": self.sequence_length,
            "rows_per_micro_batch": self.rows_per_micro_batch,
            "tokens_per_step": float(self.tokens_S.mean()),
            "padding_share": float(self.waste_S.mean()),
            "distance": {"mean": float(distance.mean()), "p95": float(np.percentile(distance, 95)), "max": float(distance.max())},
            "micro_batch_rows": float(self.micro_batch_rows_S.max()),
            "alignments": {
                name: {
                    "planned": float(planned),
                    "realised": float(realised),
                    "largest_difference": float(off),
                    "records_used": int(uses),
                    "epochs": float(epochs),
                    "ends_at_step": self.ended.get(name),
                }
                for name, (planned, realised, off, uses, epochs) in zip(self.alignments, rows, strict=True)
            },
        }


def plan_numbers(loader: TypedLoader, rows_per_micro_batch: int) -> PlanNumbers:
    """Every global batch of the run, from the plan."""
    rows_per_batch, num_alignments = loader.data.rows_per_batch, len(loader.alignments)
    assert loader.steps is not None
    planned_SA = np.array([loader.mixture.at(step) for step in range(loader.steps)])
    micro_batches_MR = _dealt(loader.batch(0), rows_per_micro_batch)
    tokens, uses, micro_batch_rows = [], [], []
    for first, last in _stretches(loader, loader.steps):
        tokens_RA, uses_RA = rows_by_alignment(loader, first * rows_per_batch, last * rows_per_batch)
        tokens_SRA = tokens_RA.reshape(last - first, rows_per_batch, num_alignments)
        tokens_SMA = tokens_SRA[:, micro_batches_MR].sum(2)
        due_SMA = planned_SA[first:last, None] * tokens_SMA.sum(2, keepdims=True)
        micro_batch_rows.append(np.abs(tokens_SMA - due_SMA).max((1, 2)) / loader.length)
        tokens.append(tokens_SRA.sum(1))
        uses.append(uses_RA.reshape(last - first, rows_per_batch, num_alignments).sum(1))
    ended = {name: step for step, name in loader.plan.ended if step < loader.steps}  # the plan found may be of more steps
    return PlanNumbers(
        tuple(loader.alignments),
        rows_per_batch,
        loader.length,
        rows_per_micro_batch,
        loader.records_A,
        np.concatenate(tokens),
        np.concatenate(uses),
        _without_ended(planned_SA, np.concatenate(tokens), loader.alignments, ended),
        np.concatenate(micro_batch_rows),
        ended,
    )


def rows_by_alignment(loader: TypedLoader, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, A) int64 each: tokens and records of each alignment in the plan's rows from `first` to before `last`."""
    starts = loader.plan.row_starts[first : last + 1]
    ids_U = loader.plan.records[starts[0] : starts[-1]]
    cells_U = np.repeat(np.arange(last - first), np.diff(starts)) * len(loader.alignments) + loader.records.labels[ids_U]
    size = (last - first) * len(loader.alignments)
    tokens = np.bincount(cells_U, loader.kept[ids_U], size).astype(np.int64)
    return tokens.reshape(last - first, -1), np.bincount(cells_U, minlength=size).reshape(last - first, -1)


def _dealt(batch: GlobalBatch, rows_per_micro_batch: int) -> np.ndarray:
    """(M, R): row numbers of each micro-batch, as one rank would have them; all batches are dealt out alike."""
    numbers = replace(batch, rows=list(np.arange(len(batch.rows))[:, None]))
    return np.array([np.concatenate(part) for part in rows_of_rank(numbers, 0, 1, rows_per_micro_batch)])


def _stretches(loader: TypedLoader, steps: int) -> Iterator[tuple[int, int]]:
    """Steps in stretches of at most CHUNK uses of records, but at least one step."""
    starts = loader.plan.row_starts[: steps * loader.data.rows_per_batch + 1 : loader.data.rows_per_batch]
    first = 0
    while first < steps:
        last = max(first + 1, int(starts.searchsorted(starts[first] + CHUNK, "right")) - 1)
        yield first, last
        first = last


def _without_ended(planned_SA: np.ndarray, tokens_SA: np.ndarray, alignments: list[str], ended: dict[str, int]) -> np.ndarray:
    """The shares when those of ended alignments go to the others; in the step of the end an alignment can still have some."""
    left_SA = planned_SA.copy()
    for name, step in ended.items():
        a = alignments.index(name)
        left_SA[step + int(tokens_SA[step, a] > 0) :, a] = 0
    sums = left_SA.sum(1, keepdims=True)
    return np.where(sums > 0, left_SA / np.where(sums > 0, sums, 1), planned_SA)


def curves(plan: PlanNumbers, points: int = POINTS) -> dict[str, np.ndarray]:
    """The run in at most so many stretches of steps, (P,) or (P, A).

    step: steps done at its end. planned, share: of its tokens; low, high: the share's extremes among its steps. waste:
    of its positions. epochs: at its end.
    """
    starts = np.unique(np.linspace(0, plan.steps, min(points, plan.steps) + 1).astype(np.int64))[:-1]
    ends = np.append(starts[1:], plan.steps)
    tokens_PA = np.add.reduceat(plan.tokens_SA, starts)
    tokens_P = tokens_PA.sum(1)
    return {
        "step": ends,
        "planned": np.add.reduceat(plan.planned_SA * plan.tokens_S[:, None], starts) / tokens_P[:, None],
        "share": tokens_PA / tokens_P[:, None],
        "low": np.minimum.reduceat(plan.share_SA, starts),
        "high": np.maximum.reduceat(plan.share_SA, starts),
        "waste": 1 - tokens_P / ((ends - starts) * plan.positions),
        "epochs": plan.epochs_SA[ends - 1],
    }
