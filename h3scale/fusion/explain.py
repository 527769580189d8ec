"""Where models of one base go the same way and where they collide, tensor by tensor and layer by layer.

Of every pair of models: the cosine of their changes; the share of entries that both change much (each the largest `DENSITY` of
its own change of the tensor, as TIES keeps them) whose signs differ; and the overlap of their `DIRECTIONS` largest singular
directions, |U_i^T U_j|^2 / k, left and right averaged. Changes that have nothing to do with each other have cosine 0, half
of the signs apart, and the overlap that is given as chance. Of every model: the share of its change that is in outliers, and
of its entries that hardly change (both as RESM counts them).

One tensor at a time is looked at. Adapters are decomposed by their factors; their entries are made some rows at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations
from math import sqrt
from typing import Any, Self

from torch import Tensor

from h3scale.config.merge import Resm
from h3scale.fusion.merge import MergePlan
from h3scale.fusion.parents import Parents, Streamed
from h3scale.log import progress
from h3scale.merge.delta import length
from h3scale.merge.resm import traits_of
from h3scale.merge.select import largest
from h3scale.merge.spectrum import Triplets, largest_rank, top_triplets
from h3scale.model.names import EMBEDDINGS, layer_of

DENSITY = 0.2
DIRECTIONS = 16  # at most, and at most an eighth of the rank: of more, chance alone would have many in common
_EIGHTH = 8
RESM = Resm.model_validate({})  # whose outliers and sparsity are counted


class _Sums:
    """Numbers that add up over tensors."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class OfModel(_Sums):
    """What one model changes. `outliers` and `sparse`: shares, times entries."""

    squares: float = 0.0
    outliers: float = 0.0
    sparse: float = 0.0
    entries: int = 0

    def figures(self) -> dict[str, Any]:
        return {
            "norm": sqrt(self.squares),
            "outlier_share": _share(self.outliers, self.entries),
            "sparsity": _share(self.sparse, self.entries),
        }


@dataclass(frozen=True)
class OfPair(_Sums):
    """What two models change. `opposed` of `both` entries differ in sign; `overlap` and `chance`: times `directions`."""

    dot: float = 0.0
    both: int = 0
    opposed: int = 0
    overlap: float = 0.0
    chance: float = 0.0
    directions: int = 0

    def figures(self, one: OfModel, other: OfModel) -> dict[str, Any]:
        return {
            "cosine": _share(self.dot, sqrt(one.squares) * sqrt(other.squares)),
            "sign_conflict": _share(self.opposed, self.both),
            "entries_of_both": self.both,
            "overlap": _share(self.overlap, self.directions),
            "overlap_by_chance": _share(self.chance, self.directions),
        }


@dataclass(frozen=True)
class Found:
    """One tensor, or the sum of several. `models` by their order; `pairs` by that of `combinations`."""

    models: list[OfModel]
    pairs: list[OfPair]

    def __add__(self, other: "Found") -> "Found":
        models = [one + more for one, more in zip(self.models, other.models, strict=True)]
        return Found(models, [one + more for one, more in zip(self.pairs, other.pairs, strict=True)])

    def figures(self, labels: Sequence[str]) -> dict[str, Any]:
        pairs = combinations(range(len(labels)), 2)
        return {
            "models": {label: model.figures() for label, model in zip(labels, self.models, strict=True)},
            "pairs": [
                {"models": [labels[i], labels[j]], **pair.figures(self.models[i], self.models[j])}
                for (i, j), pair in zip(pairs, self.pairs, strict=True)
            ],
        }


def explain(plan: MergePlan) -> dict[str, Any]:
    """The JSON value of a merge's models: `tensors`, `layers`, `whole`, and where they `collide_most`. No times.

    DataError (65) for values that are not finite.
    """
    parents, labels = plan.parents, plan.parents.labels
    found: dict[str, Found] = {}
    names = [spec.name for spec in plan.tensors if parents.is_changed(spec.name)]
    with progress("explain", len(names), "tensors") as bar:
        for name in names:
            found[name] = of_tensor(parents, name)
            bar.advance()
    places: dict[str, list[Found]] = {}
    for name, each in found.items():
        places.setdefault(place_of(name), []).append(each)
    layers = [{"layer": place, **_total(each).figures(labels)} for place, each in places.items()]
    shapes = {spec.name: spec.shape for spec in plan.tensors}
    tensors = [
        {"name": name, "layer": place_of(name), "shape": list(shapes[name]), **each.figures(labels)} for name, each in found.items()
    ]
    return {
        "base": str(parents.base.path),
        "models": {source.label: str(source.path) for source in parents.models.values()},
        "density": DENSITY,
        "directions": DIRECTIONS,
        "outlier_kappa": RESM.outlier_kappa,
        "sparsity_threshold": RESM.sparsity_threshold,
        "collide_most": {"layer": worst(layers, "layer"), "tensor": worst(tensors, "name")},
        "whole": _total(found.values()).figures(labels) if found else None,
        "layers": layers,
        "tensors": tensors,
    }


def of_tensor(parents: Parents, name: str) -> Found:
    """What all models change in one tensor."""
    of_models, thresholds, triplets = [], [], []
    streamed = Streamed(parents, (name,))
    for model in range(len(parents.labels)):
        delta = parents.delta(model, name)
        traits = traits_of(delta, RESM)
        sparse = float(streamed.numel - traits.num_dense)
        outliers = traits.outlier_share * streamed.numel
        of_models.append(OfModel(length(delta) ** 2, outliers, sparse, streamed.numel))
        count = max(1, int(DENSITY * streamed.numel))
        thresholds.append(largest(partial(streamed.delta, model), streamed.numel, count))
        if len(delta.shape) == 2:
            triplets.append(top_triplets(delta, min(DIRECTIONS, max(1, largest_rank(delta) // _EIGHTH))))
    pairs = _counted(streamed, thresholds)
    if triplets:
        compared = (_overlap(one, other) for one, other in combinations(triplets, 2))
        pairs = [pair + overlap for pair, overlap in zip(pairs, compared, strict=True)]
    return Found(of_models, pairs)


def place_of(name: str) -> str:
    """The layer of a tensor, by number from 0, or "embeddings", or "other"."""
    layer = layer_of(name)
    if layer is not None:
        return str(layer)
    return "embeddings" if name in EMBEDDINGS else "other"


def worst(entries: Iterable[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Where the largest share of the entries that two models change has signs that differ; a few entries' chance counts less."""
    found = [{key: entry[key], **pair} for entry in entries for pair in entry["pairs"] if pair["sign_conflict"] is not None]
    return max(found, key=lambda each: each["sign_conflict"] - 1 / sqrt(each["entries_of_both"]), default=None)


def collision(explained: dict[str, Any]) -> str:
    """Where the models collide most, in a sentence."""
    layer, tensor = explained["collide_most"]["layer"], explained["collide_most"]["tensor"]
    if layer is None:
        return "no entry is changed much by two models: they cannot collide"
    one, other = layer["models"]
    place = f"layer {layer['layer']}" if layer["layer"].isdigit() else f"what is in no layer ({layer['layer']})"
    at = f"{layer['sign_conflict']:.0%} of the entries that both change much have opposite signs, cosine {layer['cosine']:+.2f}"
    return f"{one} and {other} collide most in {place}: {at}; of all tensors in {tensor['name']} ({tensor['sign_conflict']:.0%})"


def _counted(streamed: Streamed, thresholds: Sequence[float]) -> list[OfPair]:
    pairs = list(combinations(range(len(thresholds)), 2))
    totals = [OfPair() for _ in pairs]
    for _, deltas in streamed.pairs():
        matters = [(delta.abs() >= least) & (delta != 0) for delta, least in zip(deltas, thresholds, strict=True)]
        for place, (i, j) in enumerate(pairs):
            both = matters[i] & matters[j]
            opposed = both & ((deltas[i] > 0) != (deltas[j] > 0))
            dot = float((deltas[i].double() * deltas[j]).sum())
            totals[place] += OfPair(dot, int(both.sum()), int(opposed.sum()))
    return totals


def _overlap(one: Triplets, other: Triplets) -> OfPair:
    count = min(len(one.values_K), len(other.values_K))
    if not count:
        return OfPair()
    sides: list[tuple[Tensor, Tensor]] = [(one.left_OK, other.left_OK), (one.right_IK, other.right_IK)]
    shared = sum(float((a[:, :count].T.double() @ b[:, :count].double()).square().sum()) for a, b in sides) / 2
    chance = sum(count * count / len(a) for a, _ in sides) / 2
    return OfPair(overlap=shared, chance=chance, directions=count)


def _total(found: Iterable[Found]) -> Found:
    first, *others = found
    for each in others:
        first += each
    return first


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
