"""From a ZeRO checkpoint to a universal one of DeepSpeed's (0.19.8), which an engine of the same ZeRO stage loads on any topology.

`zero/NAME/fp32.pt`, `exp_avg.pt`, `exp_avg_sq.pt` and `step.pt` for each parameter, experts stacked; what the optimizer knows
of itself in `zero/optimizer_state.pt`; the counters in the model states of rank 0. Where we differ from ds_to_universal:
- frozen tensors are kept, as `zero/NAME/fp32.pt` in the dtype that they have. No engine loads them from there (it loads what
  is trained): build the model from the consolidated folder;
- values are streamed, and no second copy of them is in the model states and in optimizer_state.pt;
- settings in which parameter groups differ, such as weight decay, stay the new engine's where the loader would give all of them
  the first group's (ZeRO-3); names of groups, which tell experts' ranks, stay the new engine's too;
- nothing is unpickled but plain values;
- a receipt has the sha256 of every file and tensor, and where each expert's values and moments came from.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from h3scale.checkpoint.extents import Stored, Weights
from h3scale.checkpoint.journal import Work, check_space, resumed_folder
from h3scale.checkpoint.model_writer import Options, Summary, keep_source
from h3scale.checkpoint.proof import check_disjoint
from h3scale.checkpoint.receipt import receipt_of, sha256, sha256_around, tensor_entry
from h3scale.checkpoint.shard_files import TensorSpec
from h3scale.checkpoint.shards import check_output, sync_one
from h3scale.checkpoint.stacked import Family, pieces_of
from h3scale.checkpoint.stream import Output, Piece, Writer
from h3scale.checkpoint.tag_folder import UNIVERSAL, TagFolder, find_files
from h3scale.checkpoint.torch_files import PlainLossScaler, TorchFile, save
from h3scale.checkpoint.training_checkpoint import MODEL, TrainingCheckpoint, find_checkpoint
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.errors import UnsafeError, UsageError
from h3scale.log import progress

VALUES = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
_PARAM = "param"
# of an optimizer's state, what lies in the files of parameters, or says how ranks had divided it
_SHARDED = (
    "fp32_flat_groups",
    "ds_zero_partition_groups",
    "single_partition_of_fp32_groups",
    "param_slice_mappings",
    "base_optimizer_state",
    "optimizer_state_dict",
)


@dataclass(frozen=True)
class _File:
    """A file of torch.save: `states`, in which `values` is to be under "param"; `states` alone when there are none.

    `pieces`: the values again, by what they are in the hub layout.
    """

    name: str
    states: Any
    values: Stored | None = None
    pieces: tuple[Piece, ...] = ()


def write_universal(
    source: str | Path, target: str | Path, how: Options, force: bool = False, config_from: str | Path | None = None
) -> Summary:
    """Writes a training checkpoint of ZeRO-1, 2 or 3 as a universal one. The same call goes on where a killed one was.

    A config.json, the checkpoint's own or that of `config_from`, gives the receipt the names of the hub layout; without one it
    has those that are stored. Raises what the readers of ZeRO checkpoints do, DataError (65) also where the optimizer has no
    moments yet, or has other experts than the config asks for.
    """
    start = time.monotonic()
    check_output(target, force)
    how.check_receipt(Path(target), force)
    checkpoint = find_checkpoint(source, source)  # needs no config
    checkpoint.check_sizes()
    files = find_files(checkpoint.deepspeed)
    if files.universal:
        raise UsageError(f"{source}: is a universal checkpoint already")
    weights = open_deepspeed(checkpoint.deepspeed)
    family = Family.of(Path(config_from) if config_from else checkpoint.path / MODEL, weights, needed=config_from is not None)
    plan = list(_plan(files, weights, family))
    outputs = {file.name: _output(file, file.values) for file in plan if file.values}
    check_disjoint(outputs)
    keep_source(Path(target), checkpoint.path, outputs, checkpoint.path, checkpoint.deepspeed)
    with resumed_folder(target, _key(files, plan, how), force, how.fsync) as work:
        check_space(work.folder, sum(outputs[file.name].spec.num_bytes for file in _left(plan, work) if file.values))
        _write(work, plan, outputs, how)
        if how.receipt is not None:
            about = _about(checkpoint, weights, family, how.seen_from_receipt(Path(target)))
            how.write_receipt(work.folder, _receipt(work, plan, outputs, about))
    return _summary(Path(target), checkpoint, weights, outputs, time.monotonic() - start)


def _summary(
    target: Path, checkpoint: TrainingCheckpoint, weights: Weights, outputs: dict[str, Output], duration_s: float
) -> Summary:
    return Summary(
        target=target,
        source=checkpoint.path,
        kind=weights.kind,
        step=_step(checkpoint, weights),
        world_size=weights.world_size,
        ep_size=weights.ep_size,
        num_tensors=len(weights.entries),
        num_parameters=sum(entry.numel for entry in weights.entries.values()),
        num_bytes=sum(output.spec.num_bytes for output in outputs.values()),
        dtypes=tuple(sorted({output.spec.dtype for output in outputs.values()}, key=str)),
        duration_s=duration_s,
    )


def _step(checkpoint: TrainingCheckpoint, weights: Weights) -> int | None:
    return (checkpoint.manifest or {}).get("step", weights.step)


def _plan(files: TagFolder, weights: Weights, family: Family) -> Iterator[_File]:
    model = TorchFile(files.whole or files.model[0])
    optim = TorchFile(files.optim[0])
    moments = {moment: open_deepspeed(files.path, moment) for moment in MOMENTS}
    state, groups = _optimizer(optim)
    buffers = set(model.states.get("buffer_names") or [])
    prefixes = {layer["expert_key_prefix"] for layer in model.states.get("ds_autoep_layers") or []}
    for name, values in weights.entries.items():
        if Path(name).name != name:
            raise UnsafeError(f"{files.path}: a tensor is called '{name}', which would lie outside the folder")
        if name in buffers:
            continue
        known: dict[str, Any] = {_PARAM: None, "cat_dim": 0}
        is_stack = name.rpartition(".")[0] in prefixes
        if is_stack:
            known |= {"is_expert_param": True, "ep_num_experts": values.shape[0]}
        yield _File(f"{UNIVERSAL}/{name}/{VALUES}.pt", known, values, pieces_of(family, name, values, is_stack))
        trained = {moment: of.entries[name] for moment, of in moments.items() if name in of.entries}
        for moment, held in trained.items():
            yield _File(f"{UNIVERSAL}/{name}/{moment}.pt", known, held, pieces_of(family, name, held, is_stack, moment))
        if trained:
            yield _File(f"{UNIVERSAL}/{name}/step.pt", state[0]["step"])
    kept = {key: value for key, value in optim.get("optimizer_state_dict").items() if key not in _SHARDED}
    zero3 = {"state": {0: {"step": state[0]["step"]}}, "param_groups": [_shared(groups)]}
    known = {"optimizer_state_dict": zero3, "param_groups": groups}
    yield _File(f"{UNIVERSAL}/optimizer_state.pt", _real(optim, kept) | known)
    yield _File(model.path.name, _model_states(model, buffers))


def _optimizer(optim: TorchFile) -> tuple[dict[int, Any], list[Any]]:
    """The steps that AdamW has made, by parameter group, and the settings of the groups."""
    states = optim.get("optimizer_state_dict")
    of_torch = states.get("optimizer_state_dict") or states["base_optimizer_state"]
    steps = {i: {"step": _real(optim, state["step"])} for i, state in of_torch["state"].items() if "step" in state}
    groups = _real(optim, of_torch["param_groups"])
    # The loader would overwrite the names of the new engine's groups, and with them which EP group an expert is of.
    return steps, [{key: value for key, value in group.items() if key != "name"} for group in groups]


def _shared(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all groups have: under ZeRO-3 the loader gives those of the first to each of them."""
    return {key: value for key, value in groups[0].items() if key == "params" or all(group.get(key) == value for group in groups)}


def _model_states(model: TorchFile, buffers: set[str]) -> Any:
    """The counters, schedules and metadata of a run, without the values that have files of their own."""
    states = {key: value for key, value in model.states.items() if key != "module"}
    states |= {"frozen_param_shapes": {}, "frozen_param_fragments": {}}
    states["module"] = {name: values for name, values in model.states["module"].items() if name in buffers}
    return _real(model, states)


def _real(file: TorchFile, value: Any) -> Any:
    """A plain value of a file with its tensors' values in it, and DeepSpeed's own loss scaler."""
    if isinstance(value, torch.Tensor):
        return file.stored(value).values()
    if isinstance(value, PlainLossScaler):
        from deepspeed.runtime.fp16 import loss_scaler

        kind = getattr(loss_scaler, type(value).__name__)
        scaler = kind.__new__(kind)
        scaler.__dict__.update({key: _real(file, held) for key, held in vars(value).items()})
        return scaler
    if isinstance(value, dict):
        return type(value)((key, _real(file, held)) for key, held in value.items())
    if isinstance(value, list):
        return [_real(file, held) for held in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_real(file, held) for held in value)
    return value


def _left(plan: list[_File], work: Work) -> list[_File]:
    return [file for file in plan if file.name not in work.done]


def _output(file: _File, values: Stored) -> Output:
    return Output(TensorSpec(file.name, values.shape, values.dtype), values, file.pieces)


def _write(work: Work, plan: list[_File], outputs: dict[str, Output], how: Options) -> None:
    left = _left(plan, work)
    total, missing = (sum(outputs[file.name].spec.num_bytes for file in files if file.values) / 1e6 for files in (plan, left))
    hashing = how.receipt is not None
    with progress("universal", total, "MB", total - missing) as bar:
        writer = Writer(outputs, how.num_workers, hashing=hashing, fsync=how.fsync, bar=bar)
        try:
            for _, files in groupby(left, lambda file: (Path(file.name).parent, file.values is None)):
                together = list(files)  # the values and moments of a tensor: each is hashed from its first byte to its last
                if together[0].values is None:
                    _write_states(work, together, hashing)
                else:
                    _write_values(work, together, writer)
        finally:
            writer.close()


def _write_states(work: Work, files: list[_File], hashing: bool) -> None:
    for file in files:
        path = work.unfinished()
        save(file.states, path)
        if work.fsync:
            sync_one(path)
        work.finish(file.name, {"sha256": sha256(path)} if hashing else None)


def _write_values(work: Work, files: list[_File], writer: Writer) -> None:
    """Files of values, on as many threads as there are files."""
    ones = {file.name: Path(file.name).stem for file in files}
    places = [
        (path := work.unfinished(ones[file.name]), writer.outputs[file.name].spec, _save_empty(path, file.states, file.values))
        for file in files
        if file.values
    ]
    hashes = writer.fill(places)
    for path, spec, at in places:
        remembered = [at, sha256_around(path, at, spec.num_bytes), hashes[spec.name]] if writer.hashing else None
        work.finish(spec.name, remembered, ones[spec.name])


def _receipt(work: Work, plan: list[_File], outputs: dict[str, Output], about: dict[str, Any]) -> dict[str, Any]:
    """The receipt, of what was remembered of every file when it was written."""
    files, tensors = {}, {}
    for file in plan:
        if file.values is None:
            files[file.name] = work.done[file.name]
            continue
        at, around, hashed = work.done[file.name]
        num_bytes = (work.folder / file.name).stat().st_size
        files[file.name] = {"header_sha256": around, "bytes": num_bytes, "values": [at, outputs[file.name].spec.num_bytes]}
        tensors[file.name] = tensor_entry(outputs[file.name], file.name, hashed, Path(about["source"]))
    return receipt_of(about, files, tensors)


def _about(checkpoint: TrainingCheckpoint, weights: Weights, family: Family, model: str) -> dict[str, Any]:
    return {
        "source": str(checkpoint.path),
        "model": model,
        "kind": weights.kind,
        "step": _step(checkpoint, weights),
        "world_size": weights.world_size,
        "ep_size": weights.ep_size,
        "layout_read": family.layout,
        "layout": "universal",
        "dtype": None,
        "only": None,
        "model_type": family.model_type,
    }


def _save_empty(path: Path, states: dict[str, Any], values: Stored) -> int:
    """A file of torch.save with room for values that are not in memory; the byte at which they begin."""
    with FakeTensorMode():
        empty = torch.empty(values.shape, dtype=values.dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        save(states | {_PARAM: empty}, path)
    file = TorchFile(path)
    extents = file.stored(file.states[_PARAM]).extents
    return extents[0].offset if extents else 0


def _key(files: TagFolder, plan: list[_File], how: Options) -> str:
    """Of the same work, the same: what is read, as it is now, and what is to come of it."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files.path.iterdir())]
    work = [(file.name, file.values) for file in plan]
    return hashlib.sha256(repr([str(files.path), stats, work, how.receipt is not None]).encode()).hexdigest()
