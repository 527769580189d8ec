"""The files of a DeepSpeed tag folder by kind and rank: complete, of one run, or a finding that says what is wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from h3scale.checkpoint.torch_files import TorchFile
from h3scale.errors import DataError, MissingInputError

_RANKED = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")
_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
UNIVERSAL = "zero"  # the folder of a universal checkpoint that has one folder a parameter


@dataclass
class TagFolder:
    """What lies in a tag folder. `whole`: the model states of ZeRO-1 and ZeRO-2. `experts`: their files by (layer, expert)."""

    path: Path
    model: dict[int, Path] = field(default_factory=dict)
    optim: dict[int, Path] = field(default_factory=dict)
    whole: Path | None = None
    experts: dict[tuple[int, int], Path] = field(default_factory=dict)

    @property
    def universal(self) -> Path | None:
        folder = self.path / UNIVERSAL
        return folder if folder.is_dir() else None

    def by_rank(self, *kinds: str) -> list[list[Path]]:
        """The files of each kind ("model", "optim") in the order of their ranks; MissingInputError (66) for those not there."""
        files = {kind: {"model": self.model, "optim": self.optim}[kind] for kind in kinds}
        ranks = range(max(max(each, default=-1) for each in files.values()) + 1)
        lost = [(kind, rank) for kind in kinds for rank in ranks if rank not in files[kind]]
        if lost:
            raise MissingInputError([f"{self.path}: the {kind} states of rank {rank} are missing" for kind, rank in lost])
        return [[files[kind][rank] for rank in ranks] for kind in kinds]


def find_files(path: Path) -> TagFolder:
    """MissingInputError (66) where there is no such folder, or none of DeepSpeed's; DataError (65) where two runs are mixed."""
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such folder")
    found = TagFolder(path)
    for file in sorted(path.iterdir()):
        if ranked := _RANKED.fullmatch(file.name):
            files = found.model if ranked[3] == "model" else found.optim
            rank = int(ranked[1])
            _check_tensor_rank(file, ranked[2])
            if rank in files:
                raise DataError(f"{file}: rank {rank} has a second file, {files[rank].name}: two runs in one folder")
            files[rank] = file
        elif whole := _WHOLE.fullmatch(file.name):
            _check_tensor_rank(file, whole[1])
            found.whole = file
        elif expert := _EXPERT.fullmatch(file.name):
            _check_tensor_rank(file, expert[3])
            found.experts[int(expert[1]), int(expert[2])] = file
    if found.whole and found.model:
        raise DataError(f"{found.whole}: beside {found.model[min(found.model)].name}, of ZeRO-3: two runs in one folder")
    if not (found.whole or found.model or found.optim):
        raise MissingInputError(f"{path}: no *_model_states.pt, so this is no DeepSpeed tag folder")
    return found


def _check_tensor_rank(file: Path, rank: str) -> None:
    if int(rank) != 0:
        raise DataError(f"{file}: tensor parallelism is not read (works: files of mp_rank_00 only)")


def check_world(files: list[TorchFile], folder: Path, num_ranks: int) -> None:
    """Model states that were written by so many ranks, all after the same step."""
    for file in files:
        size = file.get("dp_world_size")
        if size > num_ranks:
            raise MissingInputError(f"{folder}: the states of rank {num_ranks} are missing (written by {size} ranks)")
        if size != num_ranks:
            raise DataError(
                f"{file.path}: written by {size} ranks, but the folder holds files of {num_ranks}: two runs in one folder"
            )
        if file.states.get("mp_world_size", 1) != 1:
            raise DataError(f"{file.path}: tensor parallelism of {file.states['mp_world_size']} is not read (works: 1)")
        steps = file.states.get("global_steps"), files[0].states.get("global_steps")
        if steps[0] != steps[1]:
            raise DataError(f"{file.path}: of step {steps[0]}, but {files[0].path.name} of step {steps[1]}: two runs in one folder")


def check_steps(optims: list[TorchFile]) -> None:
    """DataError (65) where optimizer states have taken another number of steps than the first: files of an earlier save."""
    taken = [_steps_taken(optim) for optim in optims]
    for optim, steps in zip(optims, taken, strict=True):
        if None not in (steps, taken[0]) and steps != taken[0]:
            first = f"{optims[0].path.name} after step {taken[0]}"
            raise DataError(f"{optim.path}: after step {steps}, but {first}: two runs in one folder")


def _steps_taken(optim: TorchFile) -> float | None:
    """How often the optimizer has stepped; None where it does not say."""
    states = optim.get("optimizer_state_dict")
    of_torch = states.get("optimizer_state_dict") or states.get("base_optimizer_state")
    groups = of_torch.get("state") if isinstance(of_torch, dict) else None
    steps = next(iter(groups.values())).get("step") if groups else None
    return float(optim.stored(steps).values()) if isinstance(steps, torch.Tensor) else steps
