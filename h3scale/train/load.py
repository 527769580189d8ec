"""A model that no rank could hold: built without values, cut by ZeRO-3, filled from safetensors piece by piece.

transformers (before 5.23) gives every rank the whole state dict; DeepSpeed's way to experts gathers every layer's. Here each
rank reads only the bytes of its own shards, in pieces, and nothing is gathered. What a rank needs beside its shards, at the
most, is the experts of one layer that it holds, before they are cut over its expert-data-parallel group (AutoEP allocates
them twice). Measured in benchmarks/README.md.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.checkpoint.expected import differences, expected_shapes, stored_as
from h3scale.checkpoint.shards import ModelFolder
from h3scale.errors import DataError
from h3scale.log import progress
from h3scale.model.lora import is_update, plain_name
from h3scale.model.trainable import group_of
from h3scale.train.shard import Shard

PIECE = 2**22  # values read at once: few enough to need no memory to speak of, many enough to read at the disk's speed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def empty_model(folder: Path, ds_config: dict[str, Any]) -> nn.Module:
    """The folder's model under ZeRO-3 without its values: parameters are cut already, experts are not there at all.

    Experts are one number shown in the layer's shape: AutoEP makes the real ones, and `fill` gives everything its values
    after deepspeed.initialize. Raises DataError (65) when the folder's tensors are not those that its config asks for.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_tensors(ModelFolder(folder))
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # Buffers are made, and in fp32: deepspeed.zero.Init as a context would round the rotary frequencies to bf16.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=computes_in(ds_config), trust_remote_code=False)
    model.tie_weights()
    _cut(model, ds_config)
    return model


def computes_in(ds_config: dict[str, Any]) -> torch.dtype:
    """What forward and backward compute in."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def rounding(folder: ModelFolder, model: nn.Module, dtype: torch.dtype) -> str | None:
    """What frozen weights lose when they are kept in `dtype`, for people; None where they lose nothing.

    Trained ones lose nothing: they have fp32 masters.
    """
    finer = sorted({spec.dtype for spec in folder.specs.values() if spec.dtype.is_floating_point} - {dtype}, key=str)
    if dtype == torch.float32 or not finer or all(parameter.requires_grad for parameter in model.parameters()):
        return None
    kinds = ", ".join(str(kind).removeprefix("torch.") for kind in finer)
    return (
        f"{folder.path}: has {kinds} weights; those that are frozen are kept, and released, rounded to bfloat16 "
        "(works: a model in bfloat16, or a ds_config without bf16)"
    )


def _cut(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Gives each parameter memory and cuts it before the next one is made."""
    from deepspeed.runtime.zero import Init

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    made: dict[int, nn.Parameter] = {}
    cut: Any = None  # the first cut parameter, which knows how to cut others
    for prefix, module in model.named_modules():
        own: dict[str, nn.Parameter] = {}
        for name, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in made:
                is_expert = group_of(f"{prefix}.{name}") == "experts"
                shape = () if is_expert else empty.shape
                values = torch.empty(shape, dtype=empty.dtype, device=device).expand(empty.shape)
                made[id(empty)] = nn.Parameter(values)
                own |= {} if is_expert else {name: made[id(empty)]}
            module.register_parameter(name, made[id(empty)])  # a tied one is the same parameter again
        if own and cut is None:
            Init(module=module, config_dict_or_path=ds_config)
            cut = next(iter(own.values()))
        elif own:
            cut.convert_to_zero_parameters(param_list=list(own.values()))


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside, glibc gives every freed tensor of a layer back at once; else it keeps as much as twice the shards.

    glibc raises its threshold for mappings of their own, up to 32 MiB, each time that one is freed: the pieces of a model
    then leave holes in its heap. Afterwards it is 32 MiB, and 64 MiB stay at the end of the heap: a step's memory shall be
    used again, and to get it anew from the system took 5% of a small model's step. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**26)


@torch.no_grad()
def fill(engine: Any, folder: Path) -> None:
    """Reads this rank's part of every parameter; every rank calls this, before the first forward.

    The fp32 master weights get the file's own values, not ones that were rounded to the training's dtype first.
    """
    files = ModelFolder(folder)
    origins = _origins(files)
    named = engine.module.named_parameters()
    shards = [Shard.of(engine.module, name, p) for name, p in named if not is_update(name)]  # LoRA's begin as peft made them
    with progress("load", sum(map(len, shards)), "parameters of this rank") as bar:
        for shard in shards:
            if len(shard):
                shard.fill(_pieces(files, origins[plain_name(shard.name)], shard))
            bar.advance(len(shard))


def _pieces(files: ModelFolder, origin: list[str], shard: Shard) -> Iterator[Tensor]:
    """The flat values of a shard, in order, from the tensors of the file: one for each expert, or one in all."""
    whole = [(0, shard.begin, shard.stop)] if group_of(shard.name) != "experts" else shard.experts()
    for tensor, begin, stop in whole:
        for low in range(begin, stop, PIECE):
            yield files.flat(origin[tensor], low, min(low + PIECE, stop))


def _origins(files: ModelFolder) -> dict[str, list[str]]:
    """For each parameter of the engine, the file's tensor; for stacked experts one for each expert, by id."""
    origins: dict[str, dict[int, str]] = {}
    for name in files.files:
        stored, expert = stored_as(name, files.config.get("model_type"))
        origins.setdefault(stored, {})[expert or 0] = name
    return {stored: [names[i] for i in sorted(names)] for stored, names in origins.items()}


def check_tensors(folder: ModelFolder) -> None:
    """Raises DataError (65) when tensors are missing, unknown, of another shape, or not floating point."""
    expected = expected_shapes(folder.config, folder.path)
    spare = ("lm_head.weight",) if folder.config.get("tie_word_embeddings") else ()
    found = {n: s.shape for n, s in folder.specs.items() if n not in spare and not n.endswith("rotary_emb.inv_freq")}
    findings = differences(found, expected, folder.path)
    findings += [
        f"{folder.path}: {name} is {spec.dtype}, no floating point (quantised models cannot be trained)"
        for name, spec in folder.specs.items()
        if not spec.dtype.is_floating_point
    ]
    if findings:
        raise DataError(findings)
