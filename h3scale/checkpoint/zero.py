"""DeepSpeed ZeRO-3 checkpoints, read one tensor at a time: dense, or with experts spread by AutoEP.

What lies on disk (DeepSpeed 0.19.8; found in its sources, checked against gathered weights by tests/distributed):
- Rank R writes `zero_pp_rank_R_mp_rank_00_model_states.pt` (names, shapes, frozen values) and
  `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` (fp32 values of what is trained).
- A trained tensor is flattened, padded to a multiple of its ranks and cut in equal parts; a rank's parts of one
  optimizer sub-group lie one after another in `fp32_flat_groups[i]`, in the order of `param_shapes[i]`.
- Experts are first divided over the expert-parallel (EP) ranks, so `param_shapes` has local shapes that name whole
  experts, and then cut as above over the ranks with the same experts (EDP), not over all ranks.
- A frozen tensor is cut in the same way over all ranks, in `frozen_param_fragments`, in the dtype of training.
- A tied tensor is stored once; `shared_params` of rank 0 (of rank 0 only) names the others.
"""

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.shards import TensorSpec
from h3scale.errors import DataError, MissingInputError, UnsafeError

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")
_EXPERT_FORMAT = ("zero3_partitioned", 1)
_STAGE = 3


@dataclass
class Block:
    """One tensor as ZeRO cuts it: flattened, padded, part i on the i-th rank of its group. Parts are views of files."""

    shape: tuple[int, ...]
    num_parts: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def part_numel(self) -> int:
        return -(-prod(self.shape) // self.num_parts)

    def add(self, part: int, values: torch.Tensor, where: str) -> None:
        """Takes part number `part`; DataError when it is there already, out of range or of another size."""
        if part in self.parts or not 0 <= part < self.num_parts or values.numel() != self.part_numel:
            raise DataError(
                f"{where}: part {part} of {self.num_parts} with {values.numel()} values does not fit "
                f"(expected {self.part_numel} values, have parts {sorted(self.parts)})"
            )
        self.parts[part] = values

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The flat values from `start` to `stop`, a new tensor; only these are read from disk."""
        size = max(self.part_numel, 1)
        pieces = [
            self.parts[part][max(start - part * size, 0) : stop - part * size] for part in range(start // size, -(-stop // size))
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self.parts[0].dtype)


@dataclass
class Entry:
    """A tensor of the model. For stacked experts `experts[e]` = (EP rank that holds it, its place there)."""

    shape: tuple[int, ...]
    blocks: dict[int, Block]
    experts: tuple[tuple[int, int], ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        block = next(iter(self.blocks.values()))
        return next(iter(block.parts.values())).dtype

    def missing(self) -> list[str]:
        wanted = {0} if self.experts is None else {ep_rank for ep_rank, _ in self.experts}
        lost = [f"experts of EP rank {rank}" for rank in sorted(wanted - set(self.blocks))]
        for ep_rank, block in sorted(self.blocks.items()):
            parts = sorted(set(range(block.num_parts)) - set(block.parts))
            lost += [f"part {part} of {block.num_parts} (EP rank {ep_rank})" for part in parts]
        return lost


class ZeroCheckpoint:
    """The tensors of a tag folder: `specs` without values, `tensor(name)` and `expert(name, i)` with them.

    Files are memory-mapped, so memory is near that of the tensors asked for. Nothing in the files is executed.

    Raises MissingInputError (66) when the folder or a rank's file is missing, DataError (65) when the files are broken,
    do not belong together, or are not ZeRO-3, UnsafeError (77) when a pickle wants more than plain values.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = _find_files(self.folder)
        self.world_size = len(self._files["model"])
        self._model_states = [_load(path) for path in self._files["model"]]
        self._optim_states = [_load(path) for path in self._files["optim"]]
        self._check_world()
        self.entries: dict[str, Entry] = {}
        try:
            for rank in range(self.world_size):
                self._add_rank(rank)
            self._add_buffers()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            version = self._model_states[0].get("ds_version")
            raise DataError(f"{self.folder}: not laid out as deepspeed 0.19 does ({error!r}); written by {version}") from error
        findings = [f"{self.folder}: {name}: lacks {lost}" for name, entry in self.entries.items() for lost in entry.missing()]
        if findings:
            raise DataError(findings)

    @property
    def ep_size(self) -> int:
        """Expert-parallel size it was trained with; 1 without experts."""
        return max((layer["ep_size"] for layer in self._layers(0)), default=1)

    @property
    def is_rounded(self) -> bool:
        """Whether training computed in bf16 or fp16, so that its logits are not those of the fp32 weights."""
        config = self._model_states[0].get("ds_config") or {}
        return any((config.get(key) or {}).get("enabled", False) for key in ("bf16", "fp16", "bfloat16"))

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors: the name that is not stored, and the stored one that has its values."""
        return dict(self._model_states[0].get("shared_params") or {})

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, logical shape (all experts stacked) and stored dtype of every tensor; aliases are left out."""
        return {name: TensorSpec(name, entry.shape, entry.dtype) for name, entry in self.entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The values of one tensor or alias in its logical shape."""
        entry = self._entry(name)
        if entry.experts is None:
            return entry.blocks[0].read(0, prod(entry.shape)).view(entry.shape)
        stacked = torch.empty(entry.shape, dtype=entry.dtype)
        for expert in range(entry.shape[0]):
            stacked[expert] = self.expert(name, expert)
        return stacked

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert of a stacked tensor; only its values are read."""
        entry = self._entry(name)
        if entry.experts is None or not 0 <= expert < len(entry.experts):
            raise DataError(f"{self.folder}: {name} {entry.shape} has no expert {expert}")
        ep_rank, place = entry.experts[expert]
        numel = prod(entry.shape[1:])
        return entry.blocks[ep_rank].read(place * numel, (place + 1) * numel).view(entry.shape[1:])

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(self.aliases.get(name, name))
        if entry is None:
            raise DataError(f"{self.folder}: has no tensor '{name}'")
        return entry

    def _check_world(self) -> None:
        for path, state in zip(self._files["optim"], self._optim_states, strict=True):
            stage = int(_get(state, path, "optimizer_state_dict", "zero_stage"))
            if stage != _STAGE:
                raise DataError(f"{path}: a ZeRO-{stage} checkpoint (works: ZeRO-3; train with zero_optimization.stage: 3)")
        for path, state in zip(self._files["model"], self._model_states, strict=True):
            size = _get(state, path, "dp_world_size")
            if size != self.world_size:
                raise DataError(f"{path}: written by {size} ranks, but the folder holds files of {self.world_size}")
            if state.get("mp_world_size", 1) != 1:
                raise DataError(f"{path}: tensor parallelism of {state['mp_world_size']} is not read (works: 1)")

    def _layers(self, rank: int) -> list[dict[str, Any]]:
        return self._model_states[rank].get("ds_autoep_layers") or []

    def _add_rank(self, rank: int) -> None:
        layers = {layer["expert_key_prefix"]: layer for layer in self._layers(rank)}
        for part in self._trained_parts(rank):
            layer = layers.get(part.name.rpartition(".")[0])
            if layer is not None:
                self._add_expert(part, layer)
            elif part.is_expert:
                raise DataError(f"{part.where}: {part.name} is an expert that ds_autoep_layers does not name")
            else:
                self._add_dense(part)
        for part in self._frozen_parts(rank):
            self._add_dense(part)

    def _add_dense(self, part: "_Part") -> None:
        entry = self.entries.setdefault(part.name, Entry(part.shape, {0: Block(part.shape, part.num_parts)}))
        block = entry.blocks.get(0)
        if block is None or (block.shape, block.num_parts) != (part.shape, part.num_parts):
            raise DataError(f"{part.where}: {part.name} {part.shape}: another rank has {entry.shape}")
        block.add(part.index, part.values, f"{part.where}: {part.name}")

    def _add_expert(self, part: "_Part", layer: dict[str, Any]) -> None:
        places = _expert_places(layer, part)
        entry = self.entries.setdefault(part.name, Entry((len(places), *part.shape[1:]), {}, places))
        if entry.experts != places or entry.shape[1:] != part.shape[1:]:
            raise DataError(f"{part.where}: {part.name}: the ranks disagree on which expert is where")
        ep_rank = layer["ep_rank"]
        local = sum(1 for rank, _ in places if rank == ep_rank)
        if local != part.shape[0]:
            raise DataError(f"{part.where}: {part.name} holds {part.shape[0]} experts, but {local} belong to EP rank {ep_rank}")
        block = entry.blocks.setdefault(ep_rank, Block(part.shape, part.num_parts))
        block.add(part.index, part.values, f"{part.where}: {part.name}")

    def _trained_parts(self, rank: int) -> Iterator["_Part"]:
        path = self._files["optim"][rank]
        shapes = _get(self._model_states[rank], self._files["model"][rank], "param_shapes")
        optimizer = self._optim_states[rank]["optimizer_state_dict"]
        groups = _get(optimizer, path, "fp32_flat_groups")
        partitions = optimizer.get("ds_zero_partition_groups") or [{}] * len(groups)
        if not len(shapes) == len(groups) == len(partitions):
            raise DataError(f"{path}: {len(groups)} groups of values for {len(shapes)} groups of names")
        for names, values, partition in zip(shapes, groups, partitions, strict=True):
            count = partition.get("partition_count", self.world_size)
            sizes = [-(-prod(shape) // count) for shape in names.values()]
            if sum(sizes) != values.numel():
                raise DataError(f"{path}: a group holds {values.numel()} values where its names need {sum(sizes)}")
            pieces = values.detach().split(sizes)
            index = partition.get("partition_rank", rank)
            is_expert = "autoep_expert" in partition.get("families", ())
            for (name, shape), piece in zip(names.items(), pieces, strict=True):
                yield _Part(name, tuple(shape), count, index, piece, is_expert, str(path))

    def _frozen_parts(self, rank: int) -> Iterator["_Part"]:
        state, path = self._model_states[rank], self._files["model"][rank]
        fragments = state.get("frozen_param_fragments") or {}
        for name, shape in (state.get("frozen_param_shapes") or {}).items():
            if name not in fragments:
                raise DataError(f"{path}: the values of frozen {name} are missing")
            yield _Part(name, tuple(shape), self.world_size, rank, fragments[name].detach().flatten(), False, str(path))

    def _add_buffers(self) -> None:
        state, path = self._model_states[0], self._files["model"][0]
        for name in state.get("buffer_names") or []:
            values = _get(state, path, "module", name)
            shape = tuple(values.shape)
            self._add_dense(_Part(name, shape, 1, 0, values.flatten(), False, str(path)))


@dataclass(frozen=True)
class _Part:
    """What one rank holds of one tensor: part `index` of `num_parts` of a tensor of `shape`."""

    name: str
    shape: tuple[int, ...]
    num_parts: int
    index: int
    values: torch.Tensor
    is_expert: bool
    where: str


def _expert_places(layer: dict[str, Any], part: _Part) -> tuple[tuple[int, int], ...]:
    """For each expert of a layer: the EP rank that holds it and its place among that rank's experts."""
    found = (layer.get("checkpoint_format"), layer.get("checkpoint_format_version"))
    if found != _EXPERT_FORMAT:
        raise DataError(f"{part.where}: {part.name} is stored as {found} (works: {_EXPERT_FORMAT}, of deepspeed 0.19)")
    places: dict[int, tuple[int, int]] = {}
    for rank in layer["expert_placement"]["ranks"]:
        for place, expert in enumerate(rank["experts"]):
            if expert in places:
                raise DataError(f"{part.where}: {part.name}: expert {expert} is placed twice")
            places[expert] = (rank["rank"], place)
    if sorted(places) != list(range(layer["num_experts"])):
        raise DataError(f"{part.where}: {part.name}: experts {sorted(places)} are placed, of {layer['num_experts']}")
    return tuple(places[expert] for expert in sorted(places))


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each kind by rank, complete, or a finding that says which are missing or too many."""
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder")
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in sorted(folder.iterdir()):
        name = _FILE.fullmatch(path.name)
        if name is None:
            continue
        rank, tensor_rank, kind = int(name[1]), int(name[2]), name[3]
        if tensor_rank != 0:
            raise DataError(f"{path}: tensor parallelism is not read (works: files of mp_rank_00 only)")
        if rank in found[kind]:
            raise DataError(f"{path}: rank {rank} has a second file, {found[kind][rank].name}: two runs in one folder")
        found[kind][rank] = path
    if not found["model"] and any(folder.glob("mp_rank_*_model_states.pt")):
        raise DataError(f"{folder}: not a ZeRO-3 checkpoint (works: ZeRO-3; train with zero_optimization.stage: 3)")
    if not found["model"] and not found["optim"]:
        raise MissingInputError(f"{folder}: no zero_pp_rank_*_model_states.pt, so this is no DeepSpeed ZeRO-3 tag folder")
    ranks = range(max(max(files, default=-1) for files in found.values()) + 1)
    absent = [(kind, rank) for kind in found for rank in ranks if rank not in found[kind]]
    lost = [f"{folder}: the {kind} states of rank {rank} are missing" for kind, rank in absent]
    if lost:
        raise MissingInputError(lost)
    return {kind: [files[rank] for rank in ranks] for kind, files in found.items()}


def _load(path: Path) -> dict[str, Any]:
    """A DeepSpeed file as plain values and memory-mapped tensors; never runs what a pickle may ask for."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"'{wanted[1]}'" if wanted else "something that is no plain value"
        raise UnsafeError(f"{path}: its pickle wants {what}; refused, because loading it could run code") from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise DataError(f"{path}: not a readable torch file ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: expected a dict of states, found {type(state).__name__}")
    return state


def _get(state: Any, path: Path, *keys: str) -> Any:
    for key in keys:
        if not isinstance(state, dict) or state.get(key) is None:
            raise DataError(f"{path}: has no '{'.'.join(keys)}', so this is no file of a DeepSpeed ZeRO checkpoint")
        state = state[key]
    return state
