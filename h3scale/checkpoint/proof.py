"""That every matrix of every expert arrived exactly once, and no byte of the source twice: of a plan, and of a receipt alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

from h3scale.checkpoint.stream import Output, Piece
from h3scale.errors import DataError
from h3scale.model import names

_STACK_DIMENSIONS = 3  # (experts, rows, columns)
_Origin = tuple[str, int | None, str, str | None]  # tensor of the source, expert there, name in the hub layout, shares


class _Run(NamedTuple):
    """A run of bytes of the source: the tensor that it is there, what it is of that, and where it went."""

    file: str
    offset: int
    num_bytes: int
    tensor: str
    what: str
    output: str
    shares: str | None

    @property
    def stop(self) -> int:
        return self.offset + self.num_bytes

    def may_be(self, other: "_Run") -> bool:
        """Whether both may be made of the same bytes: tied tensors, and tensors that the source itself stored once."""
        is_same_range = (self.offset, self.num_bytes) == (other.offset, other.num_bytes)
        is_stored_once = (self.shares or self.tensor) == (other.shares or other.tensor) and self.tensor != other.tensor
        return self.what == other.what or (is_same_range and is_stored_once)


def check_disjoint(outputs: dict[str, Output]) -> None:
    """DataError (65) when two tensors are to have bytes in common, but for those that the source stored once for both."""
    _check_runs(
        _run(str(extent.path), extent.offset, extent.num_bytes, _origin(piece), output.spec.name)
        for output in outputs.values()
        for piece in output.pieces
        for extent in piece.extents
    )


def check_receipt_runs(tensors: dict[str, Any]) -> None:
    """The same of the tensors in a receipt."""
    _check_runs(
        _run(file, start, length, (piece["tensor"], piece.get("expert"), piece["name"], piece.get("shares")), name)
        for name, entry in tensors.items()
        for piece in entry["from"]
        for runs in (piece.get("bytes", []), *piece.get("made_of", {}).values())
        for file, start, length in runs
    )


def _origin(piece: Piece) -> _Origin:
    return piece.tensor, piece.expert, piece.name, piece.shares


def _run(file: str, offset: int, num_bytes: int, origin: _Origin, output: str) -> _Run:
    tensor, expert, name, shares = origin
    what = tensor if expert is None else f"{tensor}:{expert}:{name}"  # the same for tied tensors, never for two matrices
    return _Run(file, offset, num_bytes, tensor, what, output, shares)


def _check_runs(runs: Iterable[_Run]) -> None:
    before: _Run | None = None  # of those that begin earlier, the one that ends last
    for run in sorted(runs, key=lambda run: run[:6]):
        if before is None or before.file != run.file or before.stop <= run.offset:
            before = run
            continue
        if not before.may_be(run):
            raise DataError(f"{run.output} and {before.output} are made of the same bytes, {run.file} from {run.offset} on")
        before = run if run.stop >= before.stop else before


def experts_in(tensors: dict[str, Any], model_type: str | None) -> dict[str, int]:
    """How many layers, experts and matrices of experts there are in a receipt, and how many arrived exactly once.

    Where the names of the family are not known: how many tensors hold experts, and how many arrived. Nothing when dense.
    """
    moe = names.MOE.get(model_type or "")
    pieces = [piece for entry in tensors.values() for piece in entry["from"]]
    if moe is None:
        numbered = Counter((piece["name"], piece["expert"]) for piece in pieces if "expert" in piece)
        return {"tensors": len({name for name, _ in numbered}), "arrived": _once(numbered)} if numbered else {}
    found: Counter[tuple[int, int, str]] = Counter()
    for piece in pieces:
        for projection, template in moe.hub_experts.items():
            numbers = names.match(template, piece["name"])
            if numbers is not None:
                found[numbers["layer"], numbers["expert"], projection] += 1
    if not found:
        return {}
    layers, experts, matrices = (len(set(column)) for column in zip(*found, strict=True))
    return {"layers": layers, "experts": experts, "matrices": matrices, "arrived": _once(found)}


def _once(found: Counter[Any]) -> int:
    return sum(count == 1 for count in found.values())


def not_arrived(tensors: dict[str, Any], experts: dict[str, int]) -> Iterator[str]:
    """What a receipt of a whole model lacks: matrices of experts, and experts of a stack."""
    if "layers" in experts and experts["arrived"] != prod(experts[key] for key in ("layers", "experts", "matrices")):
        yield f"not every expert has arrived: {experts}"
    for name, entry in tensors.items():
        held = Counter((piece["expert"], piece["name"]) for piece in entry["from"] if "expert" in piece)
        if not held or len(entry["shape"]) != _STACK_DIMENSIONS:
            continue
        count, found = entry["shape"][0], sorted(expert for expert, _ in held.elements())
        if set(found) != set(range(count)) or _once(held) != len(held):
            yield f"not every expert has arrived: {name} is of {count}, and holds {found}"
