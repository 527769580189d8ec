"""Losses and gradients of one global batch under DeepSpeed for several cases, each rank's expert shards gathered.

python -m tests.distributed.dump_gradients RECIPE OUT LAUNCHES CASES

LAUNCHES is JSON, name -> [ranks, overrides of the recipe]; CASES, name -> overrides of the recipe's losses. Written for
each launch: OUT/NAME/lines.json, the metrics of each case, and gradients.pt, for each case one dict an EP rank.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.model.trainable import whole_shape
from h3scale.train.anchor import DriftAnchor
from h3scale.train.begin import seed_everything
from h3scale.train.engine import Run, set_learning_rate, start
from h3scale.train.loop import one_step
from h3scale.train.loss import Counts
from h3scale.train.loss_memory import LossMemory, make_loss_memory
from h3scale.train.metrics import Metrics
from h3scale.train.records import make_loader
from tests.distributed.forked import launch

START_SHARE = 0.9  # the anchor is moved there, so that the drift and its gradient are not zero at the first step

Gradients = dict[str, torch.Tensor]


class Bench:
    """A started run of which single steps are taken."""

    def __init__(self, run: Run, loader: TypedLoader, out: Path):
        self.run, self.loader = run, loader
        self.metrics = Metrics(out / "metrics.jsonl", loader.alignments, run.engine.device)
        self.saved: Gradients = {}
        self.step, run.engine.step = run.engine.step, self._keep
        run.engine.train()

    def _keep(self, *_args: object, **_kwargs: object) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self.run.engine.is_gradient_accumulation_boundary():
            for name, parameter in self.run.engine.module.named_parameters():
                if parameter.requires_grad:
                    self.saved[name] = safe_get_full_grad(parameter).detach().clone().view(whole_shape(parameter))
        return self.step()

    def take(self, recipe: TrainRecipe, memory: LossMemory, step: int = 0, share: float = 0.0) -> tuple[dict, Gradients]:
        """The metrics and gradients of a step; at `share` 0 of the learning rate the weights stay as they are."""
        batch = self.loader.batch(step)
        counts = Counts(self.loader.targets_in(batch), self.loader.tokens_in(batch, recipe.router.vote))
        set_learning_rate(self.run.engine, share)
        one_step(recipe, self.run, self.loader, batch, counts, self.metrics, memory)
        line = self.metrics.close_step(1, counts.targets, counts.votes, 1, {})
        saved, self.saved = self.saved, {}
        return line, saved

    def memory(self, recipe: TrainRecipe) -> LossMemory:
        """Of a run that begins now; what an earlier one left in the experts is taken out."""
        for module in self.run.engine.module.modules():
            vars(module).pop("forward", None)
        return make_loss_memory(recipe, self.run)

    def everyone(self, what: object) -> list:
        gathered: list = [None] * self.run.world_size
        dist.all_gather_object(gathered, what)
        return gathered


def move_start(memory: LossMemory) -> None:
    if memory.anchor:
        for held in memory.anchor.held:
            held.start = START_SHARE * held.start.float()
    if isinstance(memory.anchor, DriftAnchor):
        memory.anchor.scale_LE = memory.anchor._scales()


def rank_main(path: str, out: Path, cases: dict[str, list[str]], overrides: list[str]) -> None:
    recipe = load_recipe(TrainRecipe, path, overrides)
    seed_everything(recipe.seed)
    run = start(recipe, path)
    bench = Bench(run, make_loader(recipe, run), out)
    lines, gradients = {}, {}
    for name, more in cases.items():
        case = load_recipe(TrainRecipe, path, [*overrides, *more])
        memory = bench.memory(case)
        move_start(memory)
        if memory.balance:  # whose first step only finds the shares
            bench.take(case, memory)
        lines[name], saved = bench.take(case, memory)
        gradients[name] = bench.everyone(saved)[: recipe.ep_size]
    if run.rank == 0:
        (out / "lines.json").write_text(json.dumps(lines))
        torch.save(gradients, out / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    recipe_path, folder, launches, all_cases = sys.argv[1:]
    for title, (num_ranks, *changes) in json.loads(launches).items():
        place = Path(folder) / title
        place.mkdir(parents=True)
        launch(title, num_ranks, rank_main, recipe_path, place, json.loads(all_cases), changes)
