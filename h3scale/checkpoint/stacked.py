"""What the tensors of a training checkpoint hold, by the names of the hub layout: a matrix, or those of all experts of a layer."""

from dataclasses import dataclass
from pathlib import Path

from h3scale.checkpoint.extents import Stored, Weights
from h3scale.checkpoint.layouts import find_layout, matrix
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.stream import Piece
from h3scale.errors import DataError
from h3scale.model import names
from h3scale.model.families import num_experts


@dataclass(frozen=True)
class Family:
    """What the names of a checkpoint mean; None and 0 where no config says so. `layout` is None for a dense model too."""

    model_type: str | None = None
    layout: str | None = None
    num_experts: int = 0

    @classmethod
    def of(cls, folder: Path, weights: Weights, needed: bool) -> "Family":
        """By config.json of a folder. Where none is there it is unknown, or MissingInputError (66) when `needed`."""
        if not needed and not (folder / "config.json").is_file():
            return cls()
        config = read_json(folder / "config.json")
        model_type = config.get("model_type")
        return cls(model_type, find_layout(model_type, weights.specs, weights.folder), num_experts(config) or 0)


def pieces_of(family: Family, name: str, values: Stored, is_stack: bool, moment: str | None = None) -> tuple[Piece, ...]:
    """What a stored tensor, or a `moment` of it, holds, in the order of its bytes; of a stack each expert's.

    DataError (65) when it is of another number of experts than the config says.
    """
    of = f"{moment} of " if moment else ""
    moe = names.MOE.get(family.model_type or "")
    if moe and family.layout:
        held = names.hub_shapes(moe, family.layout, name, values.shape, family.num_experts)
        return tuple(_piece(family, moe, name, hub_name, values, of) for hub_name in held)
    if is_stack:
        return tuple(Piece(of + name, of + name, expert, values.row(expert)) for expert in range(values.shape[0]))
    return (Piece(of + name, of + name, None, values),)


def _piece(family: Family, moe: names.MoeNames, name: str, hub_name: str, values: Stored, of: str) -> Piece:
    origin = names.locate(moe, family.layout or names.HUB, hub_name)
    if origin.place is None:
        return Piece(of + hub_name, of + name, None, values)
    shape = origin.place.matrix_shape(values.shape, family.num_experts)
    if origin.place.tensor_shape(shape, family.num_experts) != values.shape:
        raise DataError(f"{name}: {values.shape}, and config.json says that there are {family.num_experts} experts")
    return Piece(of + hub_name, of + name, origin.expert, matrix(values, origin.place, origin.expert or 0, family.num_experts))
