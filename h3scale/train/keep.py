"""Which models of a run are kept, where they are written, and how the run's folder gets its name at the end.

While a run goes on everything is in `.run-NAME` beside `out`. A run that shards weights (ZeRO-3) keeps training checkpoints
`step-K`, which a run can go on from; the others keep Hugging Face folders `step-K`, and checkpoints to go on from as `resume-K`.
"""

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from h3scale.checkpoint.manifest import read_manifest
from h3scale.checkpoint.shards import sync_one
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.errors import DivergedError, H3Error, StorageError
from h3scale.exit_status import DIVERGED, DONE, checkpoints_in, write_exit_status
from h3scale.log import logger
from h3scale.train.agree import by_rank_0
from h3scale.train.dry_run import out_of_memory_told
from h3scale.train.engine import Run
from h3scale.train.naming import delete, lay_out, leave_only, step_folder, take_name
from h3scale.train.run_facts import add_facts
from h3scale.train.save import Unfinished, add_to_manifest, write_checkpoint, write_folder
from h3scale.train.storage import has_room_in_memory, writing


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    step: int
    unfinished: Unfinished


Progress = tuple[dict[str, Any], dict[str, Tensor]]  # what a run has to keep: the same on all ranks (JSON), and each rank's own


class Keeper:
    """Writes the best models so far, the last one, and those to go on from. Every rank calls its methods, with the same arguments.

    `identity`: what makes the run the one it is (train.resume). `progress`: what it has to keep beside weights and optimizer.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        run: Run,
        loader: TypedLoader,
        run_folder: Path,
        out: Path,
        force: bool,
        identity: dict[str, Any],
        progress: Callable[[], Progress],
    ):
        self.recipe, self.run, self.loader = recipe, run, loader
        self.run_folder, self.out, self.force = run_folder, out, force
        self.identity, self.progress = identity, progress
        self.best_step, self.best_nll = 0, math.inf
        self.keeps_best = bool(recipe.evaluation and recipe.evaluation.keep_best)
        # What is there, by the steps: ranks must agree, and file systems do not show the same to all of them at once.
        self.states: set[int] = set()
        self.models: set[int] = set()
        self.pending: Pending | None = None

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from the `kept` of a checkpoint's manifest, with what is there."""
        if self.keeps_best and state["best_nll"] is not None:  # else keep_best has been turned off, and the last step is the result
            self.best_step, self.best_nll = state["best_step"], state["best_nll"]

        def there() -> tuple[set[int], set[int]]:
            self._tidy()
            return set(self._states_there()), set(self._models_there())

        self.states, self.models = by_rank_0(there, f"look into {self.run_folder}")

    def take(self, step: int, nll: float) -> None:
        """The model after `step` steps has this mean held-out NLL: kept if it is the best so far, and the one before is not."""
        if not self.keeps_best or not nll < self.best_nll:
            return
        self.settle()
        self.best_step, self.best_nll = step, nll
        self._write(step, {"best": True, "heldout_nll": nll})
        self._tidy()  # only now that there is a better one

    def save(self, step: int, must: bool) -> None:
        """A checkpoint after `step` steps to go on from; the oldest one beyond `save.keep` goes when it is complete.

        StorageError (74) where the disk refuses, if the run `must` have it: if it was asked for by more than `save.every`. Else by
        `save.on_error`. One that need not be there at once may be written in the background (`save.background`).
        """
        self.settle()
        if step in self.states:
            return
        facts = {"best": False} if self.keeps_best else {}
        try:
            self._write_state(step, facts, not must and self.recipe.save.background and has_room_in_memory(self.run))
        except StorageError as error:
            self._refused(step, must, error)

    def is_writing(self) -> bool:
        """Whether this rank has not written all of a checkpoint yet."""
        return self.pending is not None and self.pending.unfinished.is_writing()

    def settle(self) -> None:
        """Makes what is being written a checkpoint, and waits for it if need be."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            self._finish_state(pending.step, pending.unfinished)
        except StorageError as error:
            self._refused(pending.step, False, error)

    def state_folder(self, step: int) -> Path:
        """Where the checkpoint after so many steps is that a run can go on from."""
        return self._folder(step) if self.run.zero_stage == 3 else self.run_folder / f"resume-{step:06d}"

    def finish(self) -> Path:
        """Gives the run its name; what it leaves: the best step, or the last one."""
        self.settle()
        steps, kept = self.recipe.steps, self.recipe.steps
        if self.best_nll < math.inf:
            kept = self.best_step
            if self.run.rank == 0:
                beside = "" if kept == steps else f"; the last step, {steps}, is beside it"
                logger.info("kept: step %d, held-out lm %.4f%s", kept, self.best_nll, beside)
        if steps not in self.models:
            self._write(steps, {"best": False} if self.keeps_best else {})
        self._note(DONE, 0, kept)
        keep = {kept, steps}
        if self.run.zero_stage == 3:
            self._name(lambda: leave_only(self.run_folder, keep))
            return self.out / self._folder(kept).name
        self._name(lambda: lay_out(self.run_folder, kept, steps))
        return self.out

    def finish_diverged(self, step: int) -> Path:
        """As `finish`, for a run that stops after `step` good steps: they are in the name and the manifest of what it leaves."""
        self.settle()
        if step not in self.models:
            self._write(step, {"ended": DIVERGED} | ({"best": False} if self.keeps_best else {}))
        elif self.run.zero_stage == 3 and self.run.rank == 0:
            with writing(self.run_folder):
                add_to_manifest(self._folder(step), {"ended": DIVERGED})
        self._note(DIVERGED, DivergedError.exit_code, step)
        self._name(lambda: leave_only(self.run_folder, {step, self.best_step}))
        return self.out / self._folder(step).name

    def _folder(self, step: int) -> Path:
        return step_folder(self.run_folder, step)

    def _write(self, step: int, facts: dict[str, Any]) -> None:
        if self.run.zero_stage == 3:
            self._write_state(step, facts)
            return
        with writing(self.run_folder), out_of_memory_told(self.recipe, self.run, "saving"):
            write_folder(self.run, self.recipe, self._folder(step))
        self.models.add(step)

    def _write_state(self, step: int, facts: dict[str, Any], background: bool = False) -> None:
        shared, own = self.progress()
        kept = {"best_step": self.best_step, "best_nll": self.best_nll if self.best_nll < math.inf else None}
        facts = facts | {"identity": self.identity, "progress": shared, "kept": kept}
        partial = self._partial(step)
        try:
            with out_of_memory_told(self.recipe, self.run, "saving"):
                unfinished = write_checkpoint(self.run, self.recipe, self.loader, partial, step, facts, own, background)
        except StorageError:  # on all ranks alike
            self._forget(partial)
            raise
        if background:
            self.pending = Pending(step, unfinished)
        else:
            self._finish_state(step, unfinished)

    def _finish_state(self, step: int, unfinished: Unfinished) -> None:
        partial, final = self._partial(step), self.state_folder(step)
        try:
            unfinished.finish()
            by_rank_0(lambda: _commit(partial, final), f"give {final} its name")
        except StorageError:
            self._forget(partial)
            raise
        self.states.add(step)
        if self.run.zero_stage == 3:
            self.models.add(step)
        self._tidy()

    def _partial(self, step: int) -> Path:
        return self.run_folder / f".partial-{self.state_folder(step).name}"

    def _forget(self, partial: Path) -> None:
        if self.run.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _refused(self, step: int, must: bool, error: StorageError) -> None:
        """Raises it, or says that the run goes on."""
        if must or self.recipe.save.on_error == "stop":
            raise error
        if self.run.rank == 0:
            for finding in error.findings:
                logger.warning("step %d is not saved, and the run goes on (save.on_error): %s", step, finding)

    def _tidy(self) -> None:
        """Rank 0 deletes the checkpoints beyond `save.keep`, and models that were the best.

        What an older checkpoint takes for the best one stays as long as the checkpoint.
        """
        if self.run.rank:
            return
        try:
            of = self._states_there()
            newest = list(of)[: self.recipe.save.keep]
            best = {read_manifest(of[step])["kept"]["best_step"] for step in newest} | {self.best_step}
            kept = {of[step] for step in newest} | {self._folder(step) for step in best}
            for path in {*of.values(), *self._models_there().values()} - kept:
                delete(path)
        except (H3Error, OSError) as error:  # what is new is safe; who cannot read what is old must not delete it
            logger.warning("%s: old checkpoints are not deleted (%s)", self.run_folder, error)

    def _states_there(self) -> dict[int, Path]:
        """By its step each checkpoint on disk that a run can go on from, the newest first."""
        kind = self.state_folder(0).name.split("-")[0]
        return {step: path for path, step in checkpoints_in(self.run_folder, kind).items()}

    def _models_there(self) -> dict[int, Path]:
        if self.run.zero_stage == 3:
            return self._states_there()
        return {int(path.name[5:]): path for path in self.run_folder.glob("step-*") if path.name[5:].isdecimal()}

    def _note(self, ended: str, exit_code: int, step: int) -> None:
        if self.run.rank == 0:
            with writing(self.run_folder):
                add_facts(self.run_folder, {"ended": ended, "step": step, "steps": self.recipe.steps})
                write_exit_status(self.run_folder, exit_code, ended, step, self.recipe.steps)

    def _name(self, first: Callable[[], None]) -> None:
        """Gives the run's folder its name, after what is to be done `first`."""

        def name() -> None:
            with writing(self.run_folder):
                first()
            take_name(self.run_folder, self.out, self.force)

        by_rank_0(name, f"give {self.run_folder} its name")


def _commit(partial: Path, final: Path) -> None:
    """Everything is on disk, then the name is, and only then does anybody rely on it. For one rank only."""
    with writing(final.parent):
        partial.rename(final)
        try:
            sync_one(final.parent)
        except OSError:
            with suppress(OSError):
                final.rename(partial)  # what is said not to be saved is not there
            raise
