"""A merge's scaling, and what else decides most, chosen by the negative log-likelihood of validation records.

What is minimised: the mean over the alignments of NLL per response token, of the weights as they would be written (rounded to
their format), computed in fp32. Every method is linear in its scaling, so that the merged change is made once for all scalings and
kept on disk; it is made anew for another density, threshold, fraction or t, in which no method is linear. Options that the user
gave are not searched.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from h3scale import __version__
from h3scale.checkpoint.journal import check_space
from h3scale.checkpoint.shards import TOKENIZER_FILES
from h3scale.config.merge import Della, Options
from h3scale.data.encode import encode_records
from h3scale.data.records import Record
from h3scale.errors import ConfigError, DataError
from h3scale.evaluation.score import RecordScore, by_alignment, paired_difference, score_encoded
from h3scale.fusion.merge import How, MergePlan, state_of
from h3scale.fusion.merged import Merger
from h3scale.log import progress
from h3scale.model.names import EMBEDDINGS
from h3scale.model.start import check_tokenizer, load_model, load_tokenizer, placed
from h3scale.study.minimise import Axis, Point, Trial, lowest, minimise

SCALING = Axis("scaling", 0.0, 8.0, starts=(0.0, 1.0, 0.5), step=0.5)  # at 0 the model is the base
_DENSITY = Axis("density", 0.02, 1.0, starts=(0.2, 0.5), step=0.7, is_log=True)
# What beside the scaling decides most, of the methods that have it: how much of each change stays, or of the rank.
SECOND = {
    "slerp": Axis("t", 0.0, 1.0, starts=(0.25, 0.5, 0.75), step=0.25),
    "ties": _DENSITY,
    "dare": _DENSITY,
    "dare_ties": _DENSITY,
    "della": _DENSITY,
    "breadcrumbs": _DENSITY,
    "consensus_ta": Axis("mask_threshold", 0.05, 2.0, starts=(0.2, 0.4), step=0.7, is_log=True),
    "iso_cts": Axis("common_fraction", 0.0, 1.0, starts=(0.5, 0.8), step=0.25),
    "resm": Axis("sparsity_threshold", 0.001, 0.5, starts=(0.01, 0.1), step=1.6, is_log=True),  # which the ranks follow
}
_FP32 = 4  # bytes
_KEPT = 2  # changes on disk: the best's and the newest


def axes_of(method: str, options: Options) -> list[Axis]:
    """What is searched: scaling first. ConfigError (78) when all of it was given."""
    axes = [SCALING] if method != "slerp" else []  # t says it all
    if method in SECOND:
        axes.append(_della(options) if isinstance(options, Della) else SECOND[method])
    left = [axis for axis in axes if axis.key not in options.model_fields_set]
    if not left:
        named = " and ".join(axis.key for axis in axes)
        raise ConfigError(f"--search: nothing is left to search, as {named} is given (leave it out of recipe and command)")
    return left


def axes_for(plan: MergePlan) -> list[Axis]:
    """`axes_of` a plan. ConfigError (78) too for a scaling without a base, which would start from the first model."""
    axes, method = axes_of(plan.recipe.method, plan.options), plan.recipe.method
    if plan.recipe.base is None and SCALING in axes:
        raise ConfigError(f"--search: base: is required by {method} where scaling is searched (works: --base BASE)")
    return axes


def _della(options: Della) -> Axis:
    """Densities around which the window stays within 0 and 1."""
    low, high = options.window + _DENSITY.low, 1 - options.window
    return Axis("density", low, high, starts=tuple(s for s in (0.3, 0.5) if low <= s <= high), step=_DENSITY.step, is_log=True)


@dataclass(frozen=True)
class Choice:
    """What a search found: the options to merge with, and its JSON value."""

    options: Options
    result: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """For merge.json: what was searched and found, without the trials."""
        return {key: self.result[key] for key in ("minimised", "searched", "budget", "records", "best", "paired")}


def search(
    plan: MergePlan, records: Sequence[Record], budget: int, cache: Path, how: How, show: Callable[[str], None] = print
) -> Choice:
    """Evaluates at most `budget` merges; `cache` is a folder for the changes, which the caller deletes.

    DataError (65) without a tokenizer, or when no NLL is a number; ConfigError (78) when nothing is left to search; OutputError
    (73) without room for the changes.
    """
    axes = axes_for(plan)
    start = {axis.key: float(getattr(plan.options, axis.key)) for axis in axes}
    scorer = Scorer(plan, records, cache, how)
    scores: list[list[RecordScore]] = []

    def evaluate(point: Point) -> float:
        scores.append(scorer.scores(_with(plan.options, point)))
        value = objective(scores[-1])
        told = ", ".join(f"{key} {place:g}" for key, place in point.items())
        show(f"{len(scores):>3} of {budget}: {told}: mean NLL {value:.5f}")
        return value

    trials = minimise(axes, start, budget, evaluate)
    best = lowest(trials)
    if best.value != best.value:
        raise DataError("--search: no merge gives an NLL that is a number (is a parent damaged? h3scale checkpoint verify)")
    return chosen(plan, _result(plan, axes, budget, trials, scores))


def chosen(plan: MergePlan, result: dict[str, Any]) -> Choice:
    """The choice of a search, from its JSON value."""
    return Choice(_with(plan.options, result["best"]["point"]), result)


def search_key(plan: MergePlan, records: Sequence[Record], budget: int) -> str:
    """Of the same search, the same: parents and tokenizer as they are now, options and which of them are given, records, budget."""
    tokenizer = [plan.tokenizer / name for name in TOKENIZER_FILES] if plan.tokenizer else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tokenizer if path.is_file()]
    options = [plan.options.model_dump(), sorted(plan.options.model_fields_set)]
    work = [plan.recipe.model_dump(exclude={"out"}), options, str(plan.parents.device), list(records), budget, __version__]
    return hashlib.sha256(repr([state_of(plan), stats, work]).encode()).hexdigest()


def objective(scores: Sequence[RecordScore]) -> float:
    """The mean over the alignments of NLL per response token."""
    values = nll_by_alignment(scores).values()
    return sum(values) / len(values)


def nll_by_alignment(scores: Sequence[RecordScore]) -> dict[str, float]:
    """NLL per response token of each alignment."""
    groups = by_alignment(scores)
    return {name: sum(item.nll_sum for item in group) / sum(item.tokens for item in group) for name, group in groups.items()}


class Scorer:
    """The base's model in memory, whose weights become those of one merge after another."""

    def __init__(self, plan: MergePlan, records: Sequence[Record], cache: Path, how: How):
        if plan.tokenizer is None:
            raise DataError(f"--search: {plan.parents.base.path} and the models have no tokenizer (needed to score records)")
        self.plan, self.how, self.cache = plan, how, cache
        tokenizer = load_tokenizer(plan.tokenizer)
        self.model: Any = load_model(plan.parents.base.path, torch.float32).eval()
        check_tokenizer(self.model, tokenizer, str(plan.tokenizer))
        self.model = placed(self.model, plan.parents.device)
        self.encoded = encode_records(tokenizer, records)
        self.changes: dict[str, Changes] = {}
        self.made = 0

    def scores(self, options: Options) -> list[RecordScore]:
        """Of every record, with the merge that these options make."""
        change = self._change(options) if options.scaling else None
        self.load(change, options.scaling)
        found = score_encoded(self.model, self.encoded).records
        if change is not None:
            change.lowest = min(change.lowest, objective(found))
        return found

    def load(self, change: "Changes | None", scaling: float) -> None:
        """Makes the model's weights those of a merge, as they would be written."""
        parents, weights = self.plan.parents, dict(self.model.named_parameters())
        factor = torch.tensor(scaling, dtype=torch.float32)
        with torch.no_grad():
            for spec in self.plan.tensors:
                for start, stop in parents.spans(spec.name):
                    rows = parents.base_rows(spec.name, start, stop).cpu()
                    if change is not None and spec.name in change.places:
                        rows += change.rows(spec.name, start, stop) * factor
                    weights[spec.name][start:stop].copy_(rows.to(spec.dtype))

    def _change(self, options: Options) -> "Changes":
        """Of scaling 1; from disk where it is still there."""
        key = options.model_copy(update={"scaling": 1.0})
        name = key.model_dump_json()
        if name not in self.changes:
            if len(self.changes) == _KEPT:
                worst = max(self.changes, key=lambda each: self.changes[each].lowest)
                self.changes.pop(worst).path.unlink()
            self.changes[name] = Changes(self.plan, key, self.cache / f"change-{self.made}", self.how)
            self.made += 1
        return self.changes[name]


class Changes:
    """The merged change of every tensor that has one, fp32, in a file that is mapped. `lowest`: the best NLL found with it."""

    def __init__(self, plan: MergePlan, options: Options, path: Path, how: How):
        self.path, self.lowest = path, math.inf
        self.parents = plan.parents
        names = tuple(spec.name for spec in plan.tensors)
        self.merger = Merger(plan.parents, plan.recipe.method, options, names, EMBEDDINGS, alone=True)
        self.places: dict[str, int] = {}
        numel = 0
        for spec in plan.tensors:
            if plan.parents.is_changed(spec.name):
                self.places[spec.name] = numel
                numel += prod(spec.shape)
        check_space(path.parent, numel * _FP32)
        self.values = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)
        self.merger.prepare()
        threads = ThreadPoolExecutor(how.num_workers, initializer=torch.set_num_threads, initargs=(1,))
        with threads as pool, progress("merge", len(self.places), "tensors") as bar:
            for _ in pool.map(self._make, self.places):
                bar.advance()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor's change."""
        shape = self.parents.stored_base[name].shape
        width = prod(shape[1:])
        first = self.places[name] + start * width
        return self.values[first : first + (stop - start) * width].view(stop - start, *shape[1:])

    def _make(self, name: str) -> None:
        with self.merger.made(name) as made:
            for start, stop in self.parents.spans(name):
                self.rows(name, start, stop).copy_(made(start, stop))


def _with(options: Options, point: Point) -> Options:
    return type(options).model_validate(options.model_dump() | point)


def _result(
    plan: MergePlan, axes: Sequence[Axis], budget: int, trials: Sequence[Trial], scores: Sequence[list[RecordScore]]
) -> dict[str, Any]:
    """The JSON value; no times. `paired`: the best less another trial on the same records, below 0 where the best is better."""
    entries = [
        {"point": trial.point, "nll": trial.value, "by_alignment": nll_by_alignment(each)}
        for trial, each in zip(trials, scores, strict=True)
    ]
    at = trials.index(lowest(trials))
    others = {"the base": 0.0, "scaling 1": 1.0}
    paired = {}
    for name, scaling in others.items():
        place = next((i for i, trial in enumerate(trials) if trial.point.get("scaling") == scaling), at)
        if place != at:
            paired[name] = asdict(paired_difference(scores[at], scores[place]))
    return {
        "method": plan.recipe.method,
        "minimised": "mean over the alignments of NLL per response token (nats)",
        "searched": [axis.key for axis in axes],
        "budget": budget,
        "records": len(scores[at]),
        "best": entries[at],
        "paired": paired,
        "trials": entries,
    }
