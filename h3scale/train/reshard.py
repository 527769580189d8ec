"""Weights and AdamW's moments of a checkpoint, read into this run's shards, whatever ranks, ep_size or ZeRO stage cut them then.

DeepSpeed's own way to another topology loses frozen weights, counts AdamW's step once a sub-group and gives every parameter
group the first one's settings (0.19.8), and its pickles can run code. Here every rank reads the bytes of its own parts, and
nothing is unpickled but plain values.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from h3scale.checkpoint.extents import Stored, Weights
from h3scale.checkpoint.zero import open_deepspeed
from h3scale.errors import DataError
from h3scale.log import progress
from h3scale.model.trainable import group_of
from h3scale.train.ballast import masters
from h3scale.train.load import PIECE
from h3scale.train.shard import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def load_shards(engine: Any, folder: Path, applied_steps: int) -> None:
    """Fills weights, masters and moments of this rank from a DeepSpeed tag folder; AdamW has made so many steps.

    Every rank calls this. DataError (65) where the checkpoint has other tensors than the model, or no moments.
    """
    weights = open_deepspeed(folder)
    named = list(engine.module.named_parameters())
    moments = {name: open_deepspeed(folder, name) for name in MOMENTS} if applied_steps else {}
    shards = [Shard.of(engine.module, name, parameter) for name, parameter in named]
    _check(shards, weights, folder)
    states = _states(engine, applied_steps)
    with progress("load", sum(map(len, shards)), "parameters of this rank") as bar:
        for shard in shards:
            shard.fill(_pieces(weights, shard))
            _fill_whole(weights, shard)
            for moment, source in moments.items() if shard.parameter.requires_grad else ():
                shard.fill_beside(_pieces(source, shard), {m.data_ptr(): s[moment] for m, s in states})
            bar.advance(len(shard))


def _check(shards: list[Shard], weights: Weights, folder: Path) -> None:
    findings = []
    for shard in shards:
        entry = weights.entries.get(weights.stored_name(shard.name))
        local = entry.shape[1:] if entry and group_of(shard.name) == "experts" else entry.shape if entry else ()
        if entry is None:
            findings.append(f"{folder}: {shard.name} is missing")
        elif local != (shard.shape[1:] if group_of(shard.name) == "experts" else shard.shape):
            findings.append(f"{folder}: {shard.name} is {entry.shape}, the model's is {shard.shape}")
    if findings:
        raise DataError(findings)


def _pieces(source: Weights, shard: Shard) -> Iterator[Tensor]:
    """The flat values of a shard, in order and a piece at a time."""
    entry = source.entries[source.stored_name(shard.name)]
    parts: list[Stored] = [entry.flat(shard.begin, shard.stop)] if len(shard) else []
    if group_of(shard.name) == "experts":
        parts = [entry.row(expert).flat(low, high) for expert, low, high in shard.experts()]
    for part in parts:
        for low in range(0, part.numel, PIECE):
            yield part.flat(low, min(low + PIECE, part.numel)).values()


def _fill_whole(source: Weights, shard: Shard) -> None:
    """Weights that ZeRO leaves whole (stages 1 and 2), a row at a time."""
    if shard.is_cut:
        return
    entry = source.entries[source.stored_name(shard.name)]
    target = shard.parameter.data
    if not entry.shape:
        target.copy_(entry.values())
        return
    for row in range(shard.shape[0]):
        target[row].copy_(entry.row(shard.first_expert + row).values())


def _states(engine: Any, applied_steps: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """The masters of this rank, and AdamW's state of each, made if there was no step yet."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    on_cpu = type(inner).__name__ == "DeepSpeedCPUAdam"
    found = []
    for master in masters(engine):
        state = inner.state[master]
        if applied_steps and not state:
            state |= {name: torch.zeros_like(master) for name in MOMENTS}
        if applied_steps:
            fused = any(group.get("fused") for group in inner.param_groups)
            count = torch.tensor(float(applied_steps), device=master.device if fused else "cpu")
            state["step"] = applied_steps if on_cpu else count  # one of its own for each: AdamW counts it up in place
        found.append((master, state))
    return found
