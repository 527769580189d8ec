"""What a run will be fed, in numbers: from lengths, labels and the plan alone, so that millions of records take a second.

Shape suffixes: A alignments, B bins.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from h3scale.data.inspect_plan import PlanNumbers, curves, plan_numbers
from h3scale.data.loader import TypedLoader
from h3scale.data.store import Store

CAUSES = ("bad", "exact_duplicate", "near_duplicate", "heldout")
BINS = 40
WIDE = 16  # longest / shortest from which lengths are binned by their logarithm


@dataclass(frozen=True)
class SourceNumbers:
    """One file or hub set: its lines, those that its adapter leaves out, records in the store, records left out by cause."""

    path: str
    lines: int
    filtered: int
    records: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class AlignmentNumbers:
    """One alignment's records: those that are used (`records`, `tokens`, `cut`), and `left_out` because no answer fits.

    Lengths are of all of them, before anything is cut: they say what sequence_length would hold them.
    """

    name: str
    records: int
    tokens: int
    response_share: float
    shortest: int
    median: int
    p95: int
    longest: int
    cut: int
    left_out: int


@dataclass(frozen=True)
class Lengths:
    """Histogram of the records' lengths. edges: (B + 1,) int64, the last included. counts_AB: records."""

    edges: np.ndarray
    counts_AB: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """All of it."""

    sources: list[SourceNumbers]
    alignments: list[AlignmentNumbers]
    lengths: Lengths
    plan: PlanNumbers

    def as_json(self) -> dict[str, Any]:
        """Everything as numbers; what is by step is thinned to POINTS stretches."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "alignments": {item.name: {k: v for k, v in asdict(item).items() if k != "name"} for item in self.alignments},
            "plan": self.plan.as_json(),
            "lengths": {
                "edges": self.lengths.edges.tolist(),
                "records": dict(zip(self.plan.alignments, self.lengths.counts_AB.tolist(), strict=True)),
            },
            "curves": {name: values.tolist() for name, values in curves(self.plan).items()},
        }


def inspect_run(loader: TypedLoader, rows_per_micro_batch: int) -> Inspection:
    """Numbers of a loader over a prepared store that was made with `steps`."""
    store = loader.records
    assert isinstance(store, Store)
    return Inspection(
        source_numbers(store),
        alignment_numbers(loader),
        length_histogram(loader),
        plan_numbers(loader, rows_per_micro_batch),
    )


def source_numbers(store: Store) -> list[SourceNumbers]:
    """Each source of a store, in order."""
    dropped: list[Counter[str]] = [Counter() for _ in store.manifest["sources"]]
    with (store.folder / "dropped.jsonl").open(encoding="utf-8") as file:
        for item in map(json.loads, file):
            dropped[item["source"]][item["why"]] += 1
    kept = np.bincount(store.places[:, 0], minlength=len(dropped)).tolist()
    return [
        SourceNumbers(
            f"{source['path']} ({source['part']})" if source["part"] else source["path"],
            source["lines"],
            source["filtered"],
            records,
            {cause: counts[cause] for cause in CAUSES},
        )
        for source, records, counts in zip(store.manifest["sources"], kept, dropped, strict=True)
    ]


def alignment_numbers(loader: TypedLoader) -> list[AlignmentNumbers]:
    """Each alignment of a run, in label order."""
    return [_alignment_numbers(loader, a, name) for a, name in enumerate(loader.alignments)]


def _alignment_numbers(loader: TypedLoader, label: int, name: str) -> AlignmentNumbers:
    mine = loader.records.labels == label
    used = mine & loader.usable
    lengths = loader.records.lengths[mine]
    tokens = int(loader.kept[used].sum())
    shortest, median, p95, longest = np.percentile(lengths, (0, 50, 95, 100), method="lower").tolist()
    return AlignmentNumbers(
        name,
        records=int(used.sum()),
        tokens=tokens,
        response_share=int(loader.kept_responses[used].sum()) / max(tokens, 1),
        shortest=shortest,
        median=median,
        p95=p95,
        longest=longest,
        cut=int((loader.records.lengths[used] > loader.length).sum()),
        left_out=int((mine & ~used).sum()),
    )


def length_histogram(loader: TypedLoader) -> Lengths:
    """Lengths of the run's records before anything is cut; bins grow with the length where lengths differ much."""
    mine = loader.records.labels >= 0
    lengths, labels = loader.records.lengths[mine], loader.records.labels[mine]
    low, high = max(int(lengths.min()), 1), int(lengths.max())
    edges = np.geomspace(low, high, BINS + 1) if high > WIDE * low else np.linspace(low, high + 1, min(BINS, high - low + 1) + 1)
    edges = np.unique(np.append(np.floor(edges[:-1]), high + 1).astype(np.int64))
    bins = np.clip(edges.searchsorted(lengths, "right") - 1, 0, None)
    counts = np.bincount(labels * (len(edges) - 1) + bins, minlength=len(loader.alignments) * (len(edges) - 1))
    return Lengths(edges, counts.reshape(len(loader.alignments), -1))
