"""The `moe.pt` of the published H3Fusion code: a state dict of a Llama whose FFNs are lists of three FFNs. Read only.

Its experts are, as published, one and the same merge of all three alignments: `load_pretrained_weights` puts one parameter in
all three places and adds every adapter to it in place. Its router is as it was drawn at random.
"""

from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.expected import full_config
from h3scale.checkpoint.extents import BLOCK_BYTES, Computed, Stored, Weights
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.source_model import COMPUTED_ANYWAY, SourceModel, checked
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.errors import DataError, MissingInputError
from h3scale.log import logger
from h3scale.model.experts import ExpertMap
from h3scale.model.families import moe_config
from h3scale.model.names import MOE, PROJECTIONS, match

KIND = "H3Fusion moe.pt"
_ALIGNMENTS = ("helpful", "harmless", "honest")  # in the order of its experts
_TOP_K = 2


def open_h3fusion(path: Path, config_from: str | Path | None) -> SourceModel:
    """The model in a moe.pt, with the config of its base (`config_from`, a Llama) made that of a mixture.

    A warning says which experts are identical. Raises MissingInputError (66) without a config, DataError (65) when the file
    has other tensors, UnsafeError (77) when its pickle wants more than plain values.
    """
    weights = read_h3fusion(path)
    if config_from is None:
        raise MissingInputError(f"{path}: has no config (works: --config-from BASE, the folder of the Llama it was made from)")
    folder = Path(config_from)
    model = checked(path, folder, _config(folder, num_experts(weights)), weights)
    twins = identical_experts(model)
    if twins:
        same = ", ".join(map(str, twins))
        logger.warning(
            "warning: %s: experts %s are identical (layer 0), as the published code makes them: routing cannot matter. "
            "h3scale fuse makes experts that differ",
            path,
            same,
        )
    return model


def read_h3fusion(path: Path) -> Weights:
    """Where its tensors lie."""
    file = TorchFile(path)
    states: Any = file.states
    if not isinstance(states, dict) or not all(isinstance(values, torch.Tensor) for values in states.values()):
        raise DataError(f"{path}: not a state dict of tensors, so this is no moe.pt")
    entries = {name: file.stored(values) for name, values in states.items() if not name.endswith(COMPUTED_ANYWAY)}
    shared = _shared(entries)
    return Weights(path, KIND, world_size=1, ep_size=1, is_rounded=False, entries=entries, shared=shared)


def _shared(entries: dict[str, Stored]) -> dict[str, str]:
    """Names that are in the file as the same storage as another: torch.save writes a parameter with three names once."""
    first: dict[Stored, str] = {}
    owners = {name: first.setdefault(stored, name) for name, stored in entries.items() if stored.extents}
    return {name: owner for name, owner in owners.items() if owner != name}


def num_experts(weights: Weights) -> int:
    """As many as the names count; DataError (65) where there are none."""
    template = MOE["mixtral"].layouts["h3fusion"].experts["gate"].template
    found = [numbers["expert"] for name in weights.entries if (numbers := match(template, name)) is not None]
    if not found:
        raise DataError(f"{weights.folder}: no {template} in it, so this is no moe.pt")
    return max(found) + 1


def _config(folder: Path, count: int) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("model_type") in MOE:
        return config
    known = count == len(_ALIGNMENTS)
    experts = ExpertMap(_ALIGNMENTS, _ALIGNMENTS) if known else ExpertMap((), (None,) * count)
    return moe_config(full_config(config, folder).to_dict(), experts, min(_TOP_K, count), str(folder))


def identical_experts(model: SourceModel) -> list[int]:
    """Experts of the first layer that have the values of the first one, with it; none when all differ from it."""
    assert model.moe
    templates = [model.moe.hub_experts[projection] for projection in PROJECTIONS]

    def sources(expert: int) -> list[Stored | Computed]:
        return [model.source(template.format(layer=0, expert=expert)) for template in templates]

    same = [i for i in range(1, model.num_experts) if all(map(_equal, sources(0), sources(i)))]
    return [0, *same] if same else []


def _equal(one: Stored | Computed, other: Stored | Computed) -> bool:
    assert isinstance(one, Stored)
    assert isinstance(other, Stored)
    step = BLOCK_BYTES // one.dtype.itemsize
    cuts = ((start, min(start + step, one.numel)) for start in range(0, one.numel, step))
    return all(torch.equal(one.flat(*cut).values(), other.flat(*cut).values()) for cut in cuts)
