"""DeepSpeed checkpoints, dense or with experts spread by AutoEP: where each tensor of the model lies in their files.

`open_deepspeed` takes a tag folder of any ZeRO stage, or a universal checkpoint. ZeRO-3 is read here, ZeRO-1 and ZeRO-2 in
zero12, universal checkpoints in universal. What lies on disk (DeepSpeed 0.19.8; found in its sources, checked against
gathered weights by tests/distributed):
- Rank R writes `zero_pp_rank_R_mp_rank_00_model_states.pt` (names, shapes, frozen values) and
  `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` (fp32 values of what is trained).
- A trained tensor is flattened, padded to a multiple of its ranks and cut in equal parts; a rank's parts of one
  optimizer sub-group lie one after another in `fp32_flat_groups[i]`, in the order of `param_shapes[i]`.
- Experts are first divided over the expert-parallel (EP) ranks, so `param_shapes` has local shapes that name whole
  experts, and then cut as above over the ranks with the same experts (EDP), not over all ranks.
- A frozen tensor is cut in the same way over all ranks, in `frozen_param_fragments`, in the dtype of training.
- A tied tensor is stored once; `shared_params` of rank 0 (of rank 0 only) names the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from h3scale.checkpoint.autoep import ExpertLayer, expert_layers
from h3scale.checkpoint.extents import Stored, Weights, joined
from h3scale.checkpoint.tag_folder import TagFolder, check_steps, check_world, find_files
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.errors import DataError

DENSE = 0  # the place of a tensor that every EP rank has a part of


def open_deepspeed(folder: str | Path, moment: str | None = None) -> Weights:
    """The tensors of a tag folder of DeepSpeed, or AdamW's `moment` ("exp_avg", "exp_avg_sq") of those that are trained.

    Raises MissingInputError (66) when the folder or a rank's file is missing, DataError (65) when the files are broken or
    do not belong together, UnsafeError (77) when a pickle wants more than plain values.
    """
    from h3scale.checkpoint.universal import read_universal
    from h3scale.checkpoint.zero12 import read_zero12

    files = find_files(Path(folder))
    first = TorchFile(files.whole or files.model[min(files.model)]) if files.whole or files.model else None
    reader = read_universal if files.universal else read_zero12 if files.whole else read_zero3
    try:
        return reader(files, moment)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        version = first.states.get("ds_version") if first and isinstance(first.states, dict) else None
        raise DataError(f"{folder}: not laid out as deepspeed 0.19 does ({error!r}); written by {version}") from error


@dataclass
class Parts:
    """The parts of one tensor, as ZeRO-3 cuts it: flattened, padded, part i on the i-th rank of its group."""

    shape: tuple[int, ...]
    num_parts: int
    parts: dict[int, Stored] = field(default_factory=dict)

    @property
    def part_numel(self) -> int:
        return -(-prod(self.shape) // self.num_parts)

    def add(self, part: "_Part") -> None:
        """DataError when the part is there already, out of range, of another size, or of a tensor of another shape."""
        where = f"{part.where}: {part.name}"
        if (self.shape, self.num_parts) != (part.shape, part.num_parts):
            raise DataError(f"{where} {part.shape} of {part.num_parts} ranks: another rank has {self.shape} of {self.num_parts}")
        if part.index in self.parts or not 0 <= part.index < self.num_parts or part.values.numel != self.part_numel:
            raise DataError(
                f"{where}: part {part.index} of {self.num_parts} with {part.values.numel} values does not fit "
                f"(expected {self.part_numel} values, have parts {sorted(self.parts)})"
            )
        self.parts[part.index] = part.values

    def whole(self, what: str) -> Stored:
        """The tensor; DataError naming the parts that no rank has."""
        lost = [part for part in range(self.num_parts) if part not in self.parts]
        if lost:
            raise DataError([f"{what}: lacks part {part} of {self.num_parts}" for part in lost])
        return joined([self.parts[part] for part in range(self.num_parts)], self.shape)


def read_zero3(files: TagFolder, moment: str | None = None) -> Weights:
    """A ZeRO-3 tag folder."""
    models, optims = ([TorchFile(path) for path in paths] for paths in files.by_rank("model", "optim"))
    check_world(models, files.path, len(models))
    check_steps(optims)
    found: dict[str, dict[int, Parts]] = {}  # by name, then by EP rank
    layers: dict[str, ExpertLayer] = {}
    for rank, (model, optim) in enumerate(zip(models, optims, strict=True)):
        _check_stage(optim)
        here = expert_layers(model.states, True, model.path)
        frozen = () if moment else frozen_parts(rank, model, len(models))
        for part in (*_trained(rank, model, optim, len(models), moment), *frozen):
            prefix = part.name.rpartition(".")[0]
            if part.is_expert and prefix not in here:
                raise DataError(f"{part.where}: {part.name} is an expert that ds_autoep_layers does not name")
            place = here[prefix].ep_rank if prefix in here else DENSE
            found.setdefault(part.name, {}).setdefault(place, Parts(part.shape, part.num_parts)).add(part)
            if prefix in here and layers.setdefault(prefix, here[prefix]).placed != here[prefix].placed:
                raise DataError(f"{part.where}: {part.name}: the ranks disagree on which expert is where")
    first = models[0]
    return Weights(
        folder=files.path,
        kind="DeepSpeed ZeRO-3" + (" with AutoEP" if layers else ""),
        world_size=len(models),
        ep_size=max((layer.ep_size for layer in layers.values()), default=1),
        is_rounded=is_rounded(first.states),
        entries=_assembled(found, layers, files.path) | ({} if moment else buffers(first)),
        aliases=dict(first.states.get("shared_params") or {}),
        step=first.states.get("global_steps"),
    )


def _assembled(found: dict[str, dict[int, Parts]], layers: dict[str, ExpertLayer], folder: Path) -> dict[str, Stored]:
    entries = {}
    for name, by_ep_rank in found.items():
        shards = {rank: parts.whole(f"{folder}: {name} (EP rank {rank})") for rank, parts in by_ep_rank.items()}
        layer = layers.get(name.rpartition(".")[0])
        entries[name] = layer.stacked(f"{folder}: {name}", shards) if layer else shards[DENSE]
    return entries


@dataclass(frozen=True)
class _Part:
    """What one rank holds of one tensor: part `index` of `num_parts` of a tensor of `shape`."""

    name: str
    shape: tuple[int, ...]
    num_parts: int
    index: int
    values: Stored
    is_expert: bool
    where: Path


def _trained(rank: int, model: TorchFile, optim: TorchFile, world_size: int, moment: str | None) -> Iterator[_Part]:
    shapes = model.get("param_shapes")
    groups = optim.get("optimizer_state_dict", "fp32_flat_groups")
    if moment:
        groups = moments(optim, optim.get("optimizer_state_dict", "optimizer_state_dict"), moment, len(groups))
    partitions = optim.states["optimizer_state_dict"].get("ds_zero_partition_groups") or [{}] * len(groups)
    if not len(shapes) == len(groups) == len(partitions):
        raise DataError(f"{optim.path}: {len(groups)} groups of values for {len(shapes)} groups of names")
    for names, values, partition in zip(shapes, groups, partitions, strict=True):
        count = partition.get("partition_count", world_size)
        index = partition.get("partition_rank", rank)
        needed = sum(-(-prod(shape) // count) for shape in names.values())
        if needed != values.numel():
            raise DataError(f"{optim.path}: a group holds {values.numel()} values where its names need {needed}")
        group, start = optim.stored(values), 0
        for name, shape in names.items():
            stop = start - (-prod(shape) // count)
            is_expert = "autoep_expert" in partition.get("families", ())
            yield _Part(name, tuple(shape), count, index, group.flat(start, stop), is_expert, optim.path)
            start = stop


def moments(optim: TorchFile, states: dict[str, Any], moment: str, num_groups: int) -> list[Any]:
    """A moment of each flat group, in their order. DataError (65) where the optimizer has none (no step yet, not AdamW)."""
    found = [states["state"].get(group, {}).get(moment) for group in range(num_groups)]
    if any(values is None for values in found):
        raise DataError(f"{optim.path}: has no {moment} of each group (works: a checkpoint after a step of AdamW)")
    return found


def frozen_parts(rank: int, model: TorchFile, world_size: int) -> Iterator[_Part]:
    """What a rank's ZeRO-3 model states hold of the frozen tensors."""
    fragments = model.states.get("frozen_param_fragments") or {}
    for name, shape in (model.states.get("frozen_param_shapes") or {}).items():
        if name not in fragments:
            raise DataError(f"{model.path}: the values of frozen {name} are missing")
        values = model.stored(fragments[name])
        yield _Part(name, tuple(shape), world_size, rank, values.viewed((values.numel,)), False, model.path)


def buffers(model: TorchFile) -> dict[str, Stored]:
    """The buffers that are saved; every rank has all of them."""
    names = model.states.get("buffer_names") or []
    return {name: model.stored(model.get("module", name)) for name in names}


def is_rounded(states: dict[str, Any]) -> bool:
    """Whether the run computed in bf16 or fp16."""
    config = states.get("ds_config") or {}
    return any((config.get(key) or {}).get("enabled", False) for key in ("bf16", "fp16", "bfloat16"))


def _check_stage(optim: TorchFile) -> None:
    stage = int(optim.get("optimizer_state_dict", "zero_stage"))
    if stage != 3:
        raise DataError(f"{optim.path}: of ZeRO-{stage}, beside model states of ZeRO-3: two runs in one folder")
