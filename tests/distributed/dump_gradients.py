"""One rank: the gradients of one global batch under DeepSpeed, each rank's expert shards gathered, saved by name.

python -m tests.distributed.dump_gradients RECIPE OUT key=value ...
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.train.engine import start
from h3scale.train.loop import make_anchor, make_loader, one_step, seed_everything
from h3scale.train.loss import Counts
from h3scale.train.metrics import Metrics

START_SHARE = 0.9  # the anchor is moved there, so that the drift and its gradient are not zero at the first step


def main(path: str, out: str, overrides: list[str]) -> None:
    from deepspeed.utils import safe_get_full_grad

    recipe = load_recipe(TrainRecipe, path, overrides)
    seed_everything(recipe.seed)
    run = start(recipe, path)
    loader = make_loader(recipe, run)
    assert run.expert_map
    anchor = make_anchor(recipe, run)
    assert anchor
    for tensor in anchor.start.values():
        tensor.mul_(START_SHARE)
    anchor.scale_LE /= START_SHARE**2
    metrics = Metrics(Path(out) / "metrics.jsonl", loader.alignments, run.engine.device)
    saved: dict[str, torch.Tensor] = {}

    def keep(*_args: object, **_kwargs: object) -> None:
        if not run.engine.is_gradient_accumulation_boundary():
            return step()
        for name, parameter in run.engine.module.named_parameters():
            if parameter.requires_grad:
                saved[name] = safe_get_full_grad(parameter).detach().clone().view(parameter.ds_shape)
        return step()

    step, run.engine.step = run.engine.step, keep
    batch = loader.batch(0)
    counts = Counts(loader.targets_in(batch), loader.tokens_in(batch, recipe.router.vote))
    run.engine.train()
    one_step(recipe, run, loader, batch, counts, metrics, anchor)
    metrics.close_step(1, counts.targets, counts.votes, 1, {})
    everyone: list = [None] * run.world_size
    dist.all_gather_object(everyone, saved)
    if run.rank == 0:
        torch.save([everyone[r] for r in range(recipe.ep_size)], Path(out) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
