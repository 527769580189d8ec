"""The training loop: from a recipe to a committed checkpoint. Every rank runs this."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h3scale.checkpoint.shards import check_output
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.data.prepare import prepared_folder
from h3scale.errors import DivergedError, UnsafeError
from h3scale.log import LogFile, libraries_to_file
from h3scale.model.flops import Flops, attended_pairs
from h3scale.model.router import membership_AE
from h3scale.train.agree import by_rank_0
from h3scale.train.claim import Claim
from h3scale.train.dry_run import dry_run, out_of_memory_told
from h3scale.train.engine import Run, check_savable, set_learning_rate, start
from h3scale.train.guards import FiniteCheck, NotFinite, Skips, finish_step
from h3scale.train.heldout import score
from h3scale.train.keep import Keeper, check_left, open_folder
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.loss_memory import LossMemory, make_loss_memory
from h3scale.train.metrics import HELD_OUT, Metrics
from h3scale.train.records import HeldOut, make_held_out, make_loader, places
from h3scale.train.run_facts import make_metrics
from h3scale.train.schedule import learning_rate_share
from h3scale.train.storage import check_space
from h3scale.train.timing import timed_all_to_all


@dataclass
class Training:
    """What takes part in a run, and `held_out` if it has any."""

    recipe: TrainRecipe
    run: Run
    loader: TypedLoader
    metrics: Metrics
    flops: Flops
    memory: LossMemory
    skips: Skips
    keeper: Keeper
    held_out: HeldOut | None


def train(recipe: TrainRecipe, where: str, force: bool = False) -> Path:
    """Runs the recipe and gives what it leaves (docs/training.md has all of it).

    A run that shards weights (ZeRO-3) leaves a training checkpoint `out/step-K` for `checkpoint consolidate`; one that does
    not (ZeRO-0 to 2) leaves a Hugging Face folder. `out` must not exist, or be replaced by `force`.
    DivergedError (76) when too many steps in a row were not finite; the model as it was before them is kept.
    """
    out = Path(recipe.out)
    _check_place(recipe, out.resolve())
    check_output(out, force)
    run_folder = out.with_name(f".run-{out.name}")  # becomes `out` when the run has ended
    check_left(run_folder, force)
    with Claim(out) as claim, libraries_to_file() as log_file:
        training = begin(recipe, where, run_folder, force, claim, log_file)
        try:
            steps_of_run(training)
        finally:
            training.metrics.close()
        if training.skips.too_many:
            raise diverged(training)
        return training.keeper.finish()


def begin(recipe: TrainRecipe, where: str, run_folder: Path, force: bool, claim: Claim, log_file: LogFile) -> Training:
    """Everything up to the first step."""
    check_savable(recipe, where)
    seed_everything(recipe.seed)
    run = start(recipe, where)
    by_rank_0(claim.take, f"claim {recipe.out}")
    loader = make_loader(recipe, run)
    held_out = make_held_out(recipe, run, loader)
    by_rank_0(lambda: open_folder(run_folder, force), f"make {run_folder}")
    by_rank_0(lambda: check_space(recipe, run, run_folder), f"look at the room for {recipe.out}")
    log_file.open(run_folder / "logs" / f"rank-{run.rank}.log")
    memory = make_loss_memory(recipe, run)
    if recipe.guards.dry_run:
        dry_run(recipe, run, loader, memory)
    metrics, flops = make_metrics(recipe, run, loader, run_folder)
    skips = Skips(recipe.guards.max_skipped_in_a_row, run_folder / "skipped.jsonl")
    keeper = Keeper(recipe, run, loader, run_folder, Path(recipe.out), force)
    return Training(recipe, run, loader, metrics, flops, memory, skips, keeper, held_out)


def steps_of_run(t: Training) -> None:
    """All optimizer steps of the recipe, or those up to the one at which it has diverged."""
    recipe, run, loader = t.recipe, t.run, t.loader
    run.engine.train()
    if recipe.evaluation and recipe.evaluation.at_start:
        evaluate(t, 0)
    t.metrics.start()
    with timed_all_to_all(t.metrics.clock), out_of_memory_told(recipe, run, "training"):
        for step in range(recipe.steps):
            with t.metrics.clock.phase("data"):
                batch = loader.batch(step)
            share = learning_rate_share(step, recipe.steps, recipe.optimizer)
            set_learning_rate(run.engine, share)
            counts = Counts(loader.targets_in(batch), loader.tokens_in(batch, recipe.router.vote))
            not_finite = one_step(recipe, run, loader, batch, counts, t.metrics, t.memory)
            figures = t.skips.take(step + 1, not_finite, places(loader, batch) if not_finite else [])
            close_step(t, step + 1, batch, counts, figures | _known(t, batch, share))
            if t.skips.too_many:
                return
            if is_evaluated(recipe, step + 1):
                evaluate(t, step + 1)


def one_step(
    recipe: TrainRecipe,
    run: Run,
    loader: TypedLoader,
    batch: GlobalBatch,
    counts: Counts,
    metrics: Metrics,
    memory: LossMemory,
) -> NotFinite:
    """This rank's micro-batches of one global batch, and the optimizer step at the end of them.

    Where a loss or gradient of any rank is not finite, the step has no effect on any rank, and what it was is given.
    """
    engine, clock = run.engine, metrics.clock
    member_AE = membership_AE(run.expert_map, engine.device) if run.expert_map else None
    parts = run.world_size * run.micro_batches
    check = FiniteCheck(engine.device)
    not_finite: NotFinite = {}
    for rows in rows_of_rank(batch, run.rank, run.world_size, recipe.rows_per_micro_batch):
        with clock.phase("data"):
            tensors = loader.tensors(rows, run.tokenizer.pad_token_id or 0).to(engine.device)
        with clock.phase("forward"):
            losses = compute_losses(engine, tensors, counts, recipe.router, loader.alignments, member_AE, parts, memory.balance)
            metrics.add(losses.sums)
            check.see("loss", losses.total)
        with clock.phase("backward"):
            engine.backward(memory.attach(losses.total))  # LM + router
        with clock.phase("step"):
            if engine.is_gradient_accumulation_boundary():
                drift = memory.close_step()  # its gradient goes to this rank's shard
                metrics.add(drift)
                for value in drift.values():
                    check.see("drift", value)
                not_finite = finish_step(engine, check.close(engine))
            else:
                engine.step()
    if not_finite:
        memory.undo_step()
    return not_finite


def close_step(t: Training, step: int, batch: GlobalBatch, counts: Counts, known: dict[str, Any]) -> None:
    """The step's line of metrics."""
    tokens = t.loader.tokens_in(batch)
    window = getattr(t.run.config, "sliding_window", None)
    needed = t.flops.of(tokens, attended_pairs(t.loader.kept[batch.records], window))
    t.metrics.close_step(step, counts.targets, counts.votes, tokens, known, needed)


def is_evaluated(recipe: TrainRecipe, step: int) -> bool:
    """Whether held-out records are scored after so many steps."""
    return recipe.evaluation is not None and (step % recipe.evaluation.every == 0 or step == recipe.steps)


def evaluate(t: Training, step: int) -> None:
    """Scores the held-out records after so many steps, and keeps the model if it is the best."""
    assert t.held_out
    with t.metrics.paused(), out_of_memory_told(t.recipe, t.run, "evaluation"):
        figures = score(t.recipe, t.run, t.held_out)
        t.metrics.held_out(step, figures)
        t.keeper.take(step, figures[f"{HELD_OUT}lm"])


def diverged(t: Training) -> DivergedError:
    """Saves what there was before the steps that were not finite; the error that says so."""
    good, skips = t.skips.last_good, t.skips
    kept = t.keeper.finish_diverged(good)
    return DivergedError(
        f"step {good + skips.in_a_row} of {t.recipe.steps}: {skips.in_a_row} steps in a row were not finite; the model after step "
        f"{good} is in {kept}, the records are in {kept.parent / skips.path.name} (works: a lower optimizer.learning_rate than "
        f"{t.recipe.optimizer.learning_rate:g}, a longer optimizer.warmup_share, or without those records)"
    )


def seed_everything(seed: int) -> None:
    """The same seed on every rank: nothing drawn here may differ between ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_place(recipe: TrainRecipe, out: Path) -> None:
    """Raises UnsafeError (77) when the output is, or holds, something that the run reads: --force would delete it."""
    sources = [*recipe.data.records, *(recipe.evaluation.records if recipe.evaluation else [])]
    prepared = str(prepared_folder(recipe.data, recipe.out))
    inputs = [name for name in (recipe.model, recipe.tokenizer, *(source.path for source in sources), prepared) if name]
    inside = [name for name in inputs if Path(name).resolve().is_relative_to(out)]
    if inside or Path.cwd().is_relative_to(out):
        what = f"holds {', '.join(inside)}, which the run reads" if inside else "is a folder you are in"
        raise UnsafeError(f"out: {recipe.out} {what} (choose another folder)")


def _known(t: Training, batch: GlobalBatch, share: float) -> dict[str, Any]:
    """What of a step's line is known without the ranks' sums."""
    known: dict[str, Any] = {"lr": t.recipe.optimizer.learning_rate * share}
    norm = t.run.engine.get_global_grad_norm()  # before clipping; DeepSpeed knows none without ZeRO
    if norm is not None and not t.skips.in_a_row:
        known["grad_norm"] = float(norm)
    tokens_A = t.loader.tokens_by_alignment(batch).tolist()
    return known | {f"tokens/{alignment}": tokens for alignment, tokens in zip(t.loader.alignments, tokens_A, strict=True)}
