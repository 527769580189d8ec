"""DeepSpeed's universal checkpoints: `zero/NAME/fp32.pt` for each parameter, model states as the run wrote them beside it.

Experts are stacked, {"param": (experts, ...)}; a tensor of a ZeRO-3 run lies flat, and `param_shapes` has its shape. The
conversion of a ZeRO-3 run leaves frozen tensors out (DeepSpeed 0.19.8): those are in the model states.
"""

from math import prod
from pathlib import Path
from typing import Any

from h3scale.checkpoint.extents import Stored, Weights
from h3scale.checkpoint.tag_folder import TagFolder, check_world
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.checkpoint.zero import Parts, buffers, frozen_parts, is_rounded
from h3scale.checkpoint.zero12 import router_aliases
from h3scale.errors import DataError, MissingInputError

VALUES = "fp32"


def read_universal(files: TagFolder, moment: str | None = None) -> Weights:
    """A folder that ds_to_universal made."""
    assert files.universal
    models = [TorchFile(path) for path in ([files.whole] if files.whole else files.by_rank("model")[0])]
    if not files.whole and any(model.states.get("frozen_param_fragments") for model in models):
        check_world(models, files.path, len(models))  # else one rank's say all: no values are in them
    first = models[0].states
    aliases = dict(first.get("shared_params") or {}) | router_aliases(first)
    shapes = {name: tuple(shape) for group in first.get("param_shapes") or [] for name, shape in group.items()}
    entries = {} if moment else buffers(models[0]) | _frozen([] if files.whole else models, files.path)
    for folder in sorted(path for path in files.universal.iterdir() if path.is_dir() and path.name not in aliases):
        entries[folder.name] = _parameter(folder / f"{moment or VALUES}.pt", shapes.get(folder.name))
    layers = first.get("ds_autoep_layers") or []
    return Weights(
        folder=files.path,
        kind="DeepSpeed universal" + (" with AutoEP" if layers else ""),
        world_size=int(first["dp_world_size"]),
        ep_size=max((layer["ep_size"] for layer in layers), default=1),
        is_rounded=is_rounded(first),
        entries=entries,
        aliases=aliases,
        step=first.get("global_steps"),
    )


def _parameter(path: Path, shape: tuple[int, ...] | None) -> Stored:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file")
    file = TorchFile(path)
    values: Any = file.states
    if not isinstance(values, dict):
        found = file.stored(values)
        if shape is None or found.numel != prod(shape):
            raise DataError(f"{path}: {found.numel} values, and the model states say {shape}")
        return found.viewed(shape)
    found = file.stored(file.get("param"))
    if values.get("is_expert_param") and found.shape[0] != values.get("ep_num_experts"):
        raise DataError(f"{path}: {found.shape[0]} experts of {values.get('ep_num_experts')}")
    return found


def _frozen(models: list[TorchFile], folder: Path) -> dict[str, Stored]:
    found: dict[str, Parts] = {}
    for rank, model in enumerate(models):
        for part in frozen_parts(rank, model, len(models)):
            found.setdefault(part.name, Parts(part.shape, part.num_parts)).add(part)
    return {name: parts.whole(f"{folder}: {name}") for name, parts in found.items()}
