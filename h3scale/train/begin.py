"""How a run begins, or goes on: everything up to its first step. Every rank runs this."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h3scale import log
from h3scale.checkpoint.manifest import read_manifest
from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.data.prepare import prepared_folder
from h3scale.errors import OutputError, UnsafeError
from h3scale.exit_status import BEGUN, BEGUN_CODE, kept_step, write_exit_status
from h3scale.log import LogFile, logger
from h3scale.model.flops import Flops
from h3scale.model.start import check_folder
from h3scale.train.agree import by_rank_0
from h3scale.train.claim import Claim
from h3scale.train.dry_run import dry_run
from h3scale.train.engine import Run, check_savable, start
from h3scale.train.guards import Skips
from h3scale.train.keep import Keeper, Progress
from h3scale.train.loss_memory import LossMemory, make_loss_memory
from h3scale.train.metrics import Metrics
from h3scale.train.naming import finish_ended, settle
from h3scale.train.records import HeldOut, make_held_out, make_loader
from h3scale.train.resume import check_order, check_same, check_topology, identity_of, load, open_run_folder, tidy_up, trim
from h3scale.train.run_facts import make_metrics
from h3scale.train.storage import check_space


@dataclass(frozen=True)
class Options:
    """What whoever starts a run says beside the recipe.

    `force`: at the end the run's folder replaces `out`. `from_scratch`: what an earlier run has left is deleted, and not gone
    on with. `allow_change`: the run goes on though the recipe, the records, the model or the code are others than before.
    """

    force: bool = False
    from_scratch: bool = False
    allow_change: bool = False


@dataclass
class Training:
    """What takes part in a run, and `held_out` if it has any. `first_step`: how many it had taken when it went on (`resumed`)."""

    recipe: TrainRecipe
    run: Run
    loader: TypedLoader
    metrics: Metrics
    flops: Flops
    memory: LossMemory
    skips: Skips
    keeper: Keeper
    held_out: HeldOut | None
    first_step: int
    resumed: bool


def begin(recipe: TrainRecipe, where: str, run_folder: Path, options: Options, claim: Claim, log_file: LogFile) -> Training | None:
    """Everything up to the first step. None for a run that had ended, and only had to get its name."""
    _check_inputs(recipe)
    taken = claim_early(claim, recipe, run_folder)
    check_savable(recipe, where)
    seed_everything(recipe.seed)
    run = start(recipe, where)
    if by_rank_0(lambda: _ended(taken, run_folder, claim.out, options), f"claim {recipe.out}"):
        return None
    loader = make_loader(recipe, run)
    held_out = make_held_out(recipe, run, loader)
    newest = open_run_folder(run, run_folder, options.from_scratch)
    by_rank_0(lambda: check_space(recipe, run, run_folder), f"look at the room for {recipe.out}")
    log_file.open(run_folder / "logs" / f"rank-{run.rank}.log")
    memory = make_loss_memory(recipe, run)
    if recipe.guards.dry_run:
        dry_run(recipe, run, loader, memory)
    identity = by_rank_0(lambda: identity_of(recipe), "look at what the run is")
    manifest = read_manifest(newest) if newest else {"step": 0}
    if newest:
        check_topology(run, newest)
        check_same(newest, identity, options.allow_change)
        check_order(newest, loader, options.allow_change)
    metrics, flops = make_metrics(recipe, run, loader, run_folder, manifest["step"] if newest else None)
    skips = Skips(recipe.guards.max_skipped_in_a_row, run_folder / "skipped.jsonl")

    def progress() -> Progress:
        return {"skips": skips.state(), "watch": metrics.watch.state() if metrics.watch else None}, memory.state()

    keeper = Keeper(recipe, run, loader, run_folder, Path(recipe.out), options.force, identity, progress)
    training = Training(recipe, run, loader, metrics, flops, memory, skips, keeper, held_out, manifest["step"], bool(newest))
    if newest:
        go_on(training, newest, manifest)
    return training


def check_place(recipe: TrainRecipe, out: Path) -> None:
    """Raises UnsafeError (77) when the output is, or holds, something that the run reads: --force would delete it."""
    sources = [*recipe.data.records, *(recipe.evaluation.records if recipe.evaluation else [])]
    prepared = str(prepared_folder(recipe.data, recipe.out))
    inputs = [name for name in (recipe.model, recipe.tokenizer, *(source.path for source in sources), prepared) if name]
    inside = [name for name in inputs if Path(name).resolve().is_relative_to(out)]
    if inside or Path.cwd().is_relative_to(out):
        what = f"holds {', '.join(inside)}, which the run reads" if inside else "is a folder you are in"
        raise UnsafeError(f"out: {recipe.out} {what} (choose another folder)")


def _check_inputs(recipe: TrainRecipe) -> None:
    """MissingInputError (66) while nothing is written yet, not even that the run has begun."""
    if recipe.tokenizer:
        check_folder(recipe.tokenizer)
    if recipe.model:
        ModelFolder(recipe.model)


def claim_early(claim: Claim, recipe: TrainRecipe, run_folder: Path) -> OutputError | None:
    """On rank 0, before the ranks know each other: takes the claim, and says that the run has begun; or what stands against it.

    From here on, whoever kills the run leaves an exit_status.json of this start.
    """
    if log.RANK:
        return None
    try:
        claim.take()
        settle(run_folder, claim.out)
        run_folder.mkdir(exist_ok=True)
        write_exit_status(run_folder, BEGUN_CODE, BEGUN, kept_step(claim.out), recipe.steps)
    except OutputError as error:
        return error
    except OSError as error:
        return OutputError(f"{run_folder}: cannot be written ({error.strerror})")
    return None


def _ended(taken: OutputError | None, run_folder: Path, out: Path, options: Options) -> bool:
    if taken:
        raise taken
    return not options.from_scratch and finish_ended(run_folder, out, options.force)


def go_on(t: Training, newest: Path, manifest: dict[str, Any]) -> None:
    """Makes everything what it was at a checkpoint."""
    t.memory.resume(load(t.run, newest))
    t.skips.resume(manifest["progress"]["skips"])
    t.keeper.resume(manifest["kept"])
    if t.metrics.watch:
        t.metrics.watch.resume(manifest["progress"]["watch"])
    if t.run.rank == 0:
        tidy_up(newest.parent)
        for name in ("metrics.jsonl", "skipped.jsonl"):
            trim(newest.parent / name, t.first_step)
        logger.info("goes on after step %d of %d: %s", t.first_step, t.recipe.steps, newest)


def seed_everything(seed: int) -> None:
    """The same seed on every rank: nothing drawn here may differ between ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
