"""Losses and gradients of one global batch under DeepSpeed for several cases, each rank's expert shards gathered.

python -m tests.distributed.dump_gradients RECIPE OUT LAUNCHES CASES

LAUNCHES is JSON, name -> [ranks, overrides of the recipe]; CASES, name -> overrides of the recipe's losses. Written for
each launch: OUT/NAME/lines.json, the metrics of each case, and gradients.pt, for each case one dict an EP rank; of a
launch with a fused model and several ranks that hold the same experts also resume.json, see `resume`.
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
from h3scale.train.engine import Run, set_learning_rate, start
from h3scale.train.loop import one_step, seed_everything
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
        state = memory.anchor.state_dict()
        memory.anchor.load_state_dict([{n: {**part, "values": START_SHARE * part["values"]} for n, part in state.items()}])


def resume(bench: Bench, recipe: TrainRecipe) -> dict[str, object]:
    """Two steps, then the next one twice: undisturbed, and with a memory made anew from the state on the moved weights."""
    memory = bench.memory(recipe)
    for step in range(2):
        bench.take(recipe, memory, step, share=1.0)
    states = bench.everyone(memory.state_dict())
    states = [json.loads(json.dumps(state, default=torch.Tensor.tolist)) for state in states]  # what a file would hold
    line, gradients = bench.take(recipe, memory, step=2)
    fresh = bench.memory(recipe)
    fresh_line, _ = bench.take(recipe, fresh, step=2)
    again = bench.memory(recipe)
    again.load_state_dict([tensors(state) for state in states])
    again_line, again_gradients = bench.take(recipe, again, step=2)
    equal = all(torch.equal(gradients[name], again_gradients[name]) for name in gradients)
    names = ("drift", "router_balance")
    lines = [{name: line[name] for name in names} for line in (line, again_line, fresh_line)]
    return dict(zip(("undisturbed", "resumed", "fresh"), lines, strict=True)) | {"equal": all(bench.everyone(equal))}


def tensors(state: dict) -> dict:
    anchor = {name: {**part, "values": torch.tensor(part["values"])} for name, part in state["anchor"].items()}
    return {"anchor": anchor, "balance": {"shares": torch.tensor(state["balance"]["shares"], dtype=torch.float64)}}


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
    if run.expert_map and run.world_size > recipe.ep_size:
        always = ["router.balance_weight=0.7", "drift.gamma=3"]
        kinds = ("weights", "activations")
        resumed = {k: resume(bench, load_recipe(TrainRecipe, path, [*overrides, *always, f"drift.kind={k}"])) for k in kinds}
        if run.rank == 0:
            (out / "resume.json").write_text(json.dumps(resumed))
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
