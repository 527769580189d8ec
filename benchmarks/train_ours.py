"""Steps of h3scale, each as its training loop makes it: loader, losses, optimizer, metrics.

A rank of its own: `python benchmarks/train_ours.py RECIPE.json FOLDER [deepspeed]`; `deepspeed` computes the experts, if said.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Row
from ranks import serve, timed

from h3scale.config.recipe import TrainRecipe


@dataclass
class Steps:
    """A run, and where its lines go. Several may share an engine."""

    recipe: TrainRecipe
    run: Any
    loader: Any
    metrics: Any
    flops: Any
    memory: Any

    def step(self, step: int) -> Row:
        """The line of metrics of one optimizer step, on the batch of that number."""
        from h3scale.train.engine import set_learning_rate
        from h3scale.train.loop import one_step
        from h3scale.train.loss import Counts
        from h3scale.train.schedule import learning_rate_share

        loader, engine = self.loader, self.run.engine
        with self.metrics.clock.phase("data"):
            batch = loader.batch(step)
        share = learning_rate_share(step, self.recipe.steps, self.recipe.optimizer)
        set_learning_rate(engine, share)
        tokens = loader.tokens_in(batch)
        counts = Counts(loader.targets_in(batch), loader.tokens_in(batch, self.recipe.router.vote))
        one_step(self.recipe, self.run, loader, batch, counts, self.metrics, self.memory)
        known = {"lr": self.recipe.optimizer.learning_rate * share, "grad_norm": float(engine.get_global_grad_norm())}
        return self.metrics.close_step(step + 1, counts.targets, counts.votes, tokens, known, self.flops_of(step))  # type: ignore[no-any-return]

    def flops_of(self, step: int) -> int:
        from h3scale.model.flops import attended_pairs

        batch = self.loader.batch(step)
        pairs = attended_pairs(self.loader.kept[batch.records], None)
        return self.flops.of(self.loader.tokens_in(batch), pairs)  # type: ignore[no-any-return]


def deepspeeds_experts(model: torch.nn.Module) -> None:
    """Undoes what h3scale.train.expert_compute does: on a GPU DeepSpeed's kernels, else its loop."""
    from deepspeed.moe.ep_experts import GroupedExperts

    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.__class__ = GroupedExperts
            module.use_grouped_mm = torch.cuda.is_available()


def begin(settings: TrainRecipe, folder: Path) -> Steps:
    """Starts the engine on every rank; lines go to `folder`."""
    from h3scale.train.begin import seed_everything
    from h3scale.train.engine import start
    from h3scale.train.records import make_loader

    seed_everything(settings.seed)
    run = start(settings, "benchmark")
    loader = make_loader(settings, run)
    run.engine.train()
    return with_engine(settings, run, loader, folder)


def with_engine(settings: TrainRecipe, run: Any, loader: Any, folder: Path) -> Steps:
    """What a recipe makes of an engine that has started."""
    from h3scale.train.loss_memory import make_loss_memory
    from h3scale.train.run_facts import make_metrics

    folder.mkdir(parents=True, exist_ok=True)
    metrics, flops = make_metrics(settings, run, loader, folder)
    return Steps(settings, run, loader, metrics, flops, make_loss_memory(settings, run))


def rank(settings: TrainRecipe, folder: Path, theirs: bool) -> None:
    from h3scale.train.timing import timed_all_to_all

    steps = begin(settings, folder)
    if theirs:
        deepspeeds_experts(steps.run.engine.module)

    def answer(question: str) -> Row:
        line = timed(lambda: steps.step(int(question)))
        flops = steps.flops_of(int(question))
        return {"flops": flops, **{name: line[name] for name in ("lm", "tokens", "cpu_s", "wall_s")}}

    with timed_all_to_all(steps.metrics.clock):
        serve(answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank(
        TrainRecipe.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")),
        Path(sys.argv[2]),
        "deepspeed" in sys.argv[3:],
    )
