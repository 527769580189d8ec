"""Tensors that stand in each other's places: what differs is named by what has happened to it, where that can be seen."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from h3scale.model import names

_LISTED = 4  # layers that are written out


@dataclass(frozen=True, order=True)
class _Matrix:
    """A matrix of an FFN; `expert` is -1 in a dense model."""

    layer: int
    expert: int
    projection: str


def swapped(found: Mapping[str, object], wanted: Mapping[str, object], model_type: str | None) -> tuple[list[str], set[str]]:
    """Sentences on tensors that hold what others should, and the names that they explain.

    `found` and `wanted` have a hash of the values of each tensor that is not what it should be. Experts that changed places
    are named as such, matrices of one expert too (w1 and w3 are gate and up: exchanged, nothing but the output shows it).
    """
    owners: dict[object, list[str]] = {}
    for name, digest in wanted.items():
        owners.setdefault(digest, []).append(name)
    origins = {name: owners[digest][0] for name, digest in found.items() if digest in owners}
    places = {name: place for name in wanted if (place := _place(name, model_type)) is not None}
    by_place = {place: name for name, place in places.items()}
    moved = {places[name]: places[origin] for name, origin in origins.items() if name in places and origin in places}
    sentences: list[str] = []
    explained: set[str] = set()
    for sentence, matrices in (*_experts(moved), *_matrices(moved, by_place)):
        sentences.append(sentence)
        explained |= {by_place[matrix] for matrix in matrices}
    for name in sorted(origins.keys() - explained):
        sentences.append(f"{name} holds the values of {origins[name]}")
        explained.add(name)
    return sentences, explained


def _place(name: str, model_type: str | None) -> _Matrix | None:
    moe = names.MOE.get(model_type or "")
    for projection, template in (moe.hub_experts if moe else names.DENSE_FFN).items():
        numbers = names.match(template, name)
        if numbers is not None:
            return _Matrix(numbers["layer"], numbers.get("expert", -1), projection)
    return None


def _experts(moved: dict[_Matrix, _Matrix]) -> Iterator[tuple[str, set[_Matrix]]]:
    """Whole experts that hold another one of their layer."""
    swaps: dict[tuple[int, int], set[int]] = {}
    for layer, expert in sorted({(matrix.layer, matrix.expert) for matrix in moved}):
        origins = [moved.get(_Matrix(layer, expert, projection)) for projection in names.PROJECTIONS]
        others = {origin.expert for origin in origins if origin}
        wanted = [_Matrix(layer, other, projection) for other in others for projection in names.PROJECTIONS]
        if origins == wanted and others != {expert}:
            swaps.setdefault((expert, others.pop()), set()).add(layer)
    for (expert, other), layers in sorted(swaps.items()):
        both = layers & swaps.get((other, expert), set())
        if both and expert < other:
            yield f"experts {expert} and {other} are swapped in {in_layers(both)}", _whole(both, expert) | _whole(both, other)
        if layers - both:
            alone = layers - both
            yield f"expert {expert} holds the weights of expert {other} in {in_layers(alone)}", _whole(alone, expert)


def _whole(layers: Iterable[int], expert: int) -> set[_Matrix]:
    return {_Matrix(layer, expert, projection) for layer in layers for projection in names.PROJECTIONS}


def _matrices(moved: dict[_Matrix, _Matrix], by_place: dict[_Matrix, str]) -> Iterator[tuple[str, set[_Matrix]]]:
    """Two matrices of one FFN in each other's place."""
    for one, other in sorted(moved.items()):
        if moved.get(other) == one and (one.layer, one.expert) == (other.layer, other.expert) and one < other:
            of = f" of expert {one.expert}" if one.expert >= 0 else ""
            words = " and ".join(sorted(by_place[matrix].rsplit(".", 2)[1] for matrix in (one, other)))
            yield f"{words}{of} are swapped in layer {one.layer}", {one, other}


def in_layers(layers: Iterable[int]) -> str:
    """Numbers of layers in words, the first few of many."""
    layers = sorted(layers)
    text = ", ".join(map(str, layers[:_LISTED])) + (", ..." if len(layers) > _LISTED else "")
    return f"layer{'s' if len(layers) > 1 else ''} {text}"
