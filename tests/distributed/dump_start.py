"""One rank: an engine as it stands before its first step; its logits, fp32 weights and buffers are saved by rank 0.

python -m tests.distributed.dump_start RECIPE OUT key=value ...
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.train.ballast import masters as masters_of
from h3scale.train.ballast import room_for_moments
from h3scale.train.engine import start
from h3scale.train.shard import Shard

LENGTH = 24


def main(path: str, out: str, overrides: list[str]) -> None:
    run = start(load_recipe(TrainRecipe, path, overrides), path)
    module = run.engine.module
    masters = []
    for name, parameter in module.named_parameters():
        shard = Shard.of(module, name, parameter)
        masters.append((replace(shard, parameter=None), shard.values().clone()))
    buffers = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    run.engine.eval()
    with torch.no_grad():
        logits = run.engine(input_ids=torch.arange(LENGTH)[None], use_cache=False).logits
    everyone: list = [None] * run.world_size
    dist.all_gather_object(everyone, masters)
    draws: list = [None] * run.world_size
    dist.all_gather_object(draws, torch.rand(4).tolist())
    with room_for_moments(run.engine) as reserved:
        pass
    if run.rank == 0:
        numel = sum(master.numel() for master in masters_of(run.engine))
        found = {"logits": logits, "masters": everyone, "buffers": buffers, "draws": draws, "room": (reserved, numel)}
        torch.save(found, Path(out) / "start.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # as h3scale.train ends: a thread of gloo's that is still there would abort the process
