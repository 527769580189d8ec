"""The training loop: the steps of a run, and how it ends. Every rank runs this."""

from pathlib import Path
from typing import Any

from h3scale.checkpoint.shards import check_output
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import GlobalBatch, TypedLoader, rows_of_rank
from h3scale.errors import DivergedError, StoppedError
from h3scale.exit_status import run_folder_of, write_exit_status
from h3scale.log import libraries_to_file, logger
from h3scale.model.flops import attended_pairs
from h3scale.model.router import membership_AE
from h3scale.train.agree import by_rank_0
from h3scale.train.begin import Options, Training, begin, check_place
from h3scale.train.claim import Claim
from h3scale.train.dry_run import out_of_memory_told
from h3scale.train.engine import Run, set_learning_rate
from h3scale.train.guards import FiniteCheck, NotFinite, finish_step
from h3scale.train.heldout import score
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.loss_memory import LossMemory
from h3scale.train.metrics import HELD_OUT, Metrics
from h3scale.train.peers import stacks_when_hung
from h3scale.train.records import places
from h3scale.train.schedule import learning_rate_share
from h3scale.train.stop import Asked, Wish, find_launcher
from h3scale.train.storage import writing
from h3scale.train.timing import timed_all_to_all


def train(recipe: TrainRecipe, where: str, options: Options | None = None) -> Path:
    """Runs the recipe, or goes on with it, and gives what it leaves (docs/training.md has all of it).

    A run that shards weights (ZeRO-3) leaves a training checkpoint `out/step-K` for `checkpoint consolidate`; one that does
    not (ZeRO-0 to 2) leaves a Hugging Face folder. `out` must not exist, or be replaced by `force`. A run that was
    interrupted goes on from its newest checkpoint.
    DivergedError (76) when too many steps in a row were not finite; the model as it was before them is kept.
    StoppedError (75, or 0 for a STOP file) when it was asked to end; it is saved.
    """
    out, options = Path(recipe.out), options or Options()
    check_place(recipe, out.resolve())
    check_output(out, options.force)
    run_folder = run_folder_of(out)
    launcher = find_launcher()
    with Claim(out) as claim, libraries_to_file() as log_file:
        training = begin(recipe, where, run_folder, options, claim, log_file)
        if training is None:
            return out
        # To the end: a signal must not end the last save, and a launcher sends one to those that are left when a rank has ended.
        with Asked(run_folder, training.run.rank, launcher) as asked:
            try:
                steps_of_run(training, asked)
            finally:
                training.metrics.close()
            if training.skips.too_many:
                raise diverged(training)
            return training.keeper.finish()


def steps_of_run(t: Training, asked: Asked) -> None:
    """All optimizer steps of the recipe that are left, or those up to the one at which it has diverged.

    StoppedError when a rank is asked to end, after that step is saved.
    """
    recipe, run, loader = t.recipe, t.run, t.loader
    run.engine.train()
    if recipe.evaluation and recipe.evaluation.at_start and not t.resumed:
        evaluate(t, 0)
    t.metrics.start()
    hung = stacks_when_hung(recipe.collective_timeout_s)
    with timed_all_to_all(t.metrics.clock), out_of_memory_told(recipe, run, "training"), hung as not_hung:
        for step in range(t.first_step, recipe.steps):
            not_hung()
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
            save_if_asked(t, step + 1, asked)


def save_if_asked(t: Training, step: int, asked: Asked) -> None:
    """Saves where it is time, or a rank was asked to; StoppedError where it was asked to end. Not after the last step."""
    every = t.recipe.save.every
    wish, rank, is_busy = asked.together(t.run.engine.device, t.keeper.is_writing())
    if not is_busy:
        with t.metrics.paused():
            t.keeper.settle()
    if step == t.recipe.steps:
        asked.done(Wish.END)  # the run ends all the same, and leaves no such file
        return
    if not (wish or (every and step % every == 0)):
        return
    with t.metrics.paused():
        t.keeper.save(step, bool(wish))  # who asked is told, and may have little time left
    if not wish:
        return
    asked.done(wish)
    reason = str(wish) if wish in (Wish.SAVE, Wish.END) else f"{wish} on rank {rank}"
    if not wish.ends:
        if t.run.rank == 0:
            logger.info("saved after step %d: %s", step, reason)
        return
    stop = StoppedError(
        f"saved after step {step} of {t.recipe.steps} ({reason}): {t.keeper.state_folder(step)}; the same command goes on there"
    )
    stop.exit_code = 0 if wish is Wish.END else StoppedError.exit_code

    def say() -> None:
        with writing(t.keeper.run_folder):
            write_exit_status(t.keeper.run_folder, stop.exit_code, reason, step, t.recipe.steps)

    by_rank_0(say, "say how the run ended")  # and nobody leaves before it has: a launcher soon ends those that are left
    raise stop


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
    good, many, skips = t.skips.last_good, t.skips.in_a_row, t.skips
    skips.resume({"total": skips.total - many, "in_a_row": 0, "last_good": good})  # what is kept is the run before them
    kept = t.keeper.finish_diverged(good)
    return DivergedError(
        f"step {good + many} of {t.recipe.steps}: {many} steps in a row were not finite; the model after step "
        f"{good} is in {kept}, the records are in {kept.parent / skips.path.name} (works: a lower optimizer.learning_rate than "
        f"{t.recipe.optimizer.learning_rate:g}, a longer optimizer.warmup_share, or without those records)"
    )


def _known(t: Training, batch: GlobalBatch, share: float) -> dict[str, Any]:
    """What of a step's line is known without the ranks' sums."""
    known: dict[str, Any] = {"lr": t.recipe.optimizer.learning_rate * share}
    norm = t.run.engine.get_global_grad_norm()  # before clipping; DeepSpeed knows none without ZeRO
    if norm is not None and not t.skips.in_a_row:
        known["grad_norm"] = float(norm)
    tokens_A = t.loader.tokens_by_alignment(batch).tolist()
    return known | {f"tokens/{alignment}": tokens for alignment, tokens in zip(t.loader.alignments, tokens_A, strict=True)}
