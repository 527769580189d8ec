"""Which models of a run are kept, where they are written, and how the run's folder gets its name at the end.

While a run goes on everything is in `.run-NAME` beside `out`; what is complete there is a checkpoint already, should the
run be killed. A run that shards weights (ZeRO-3) keeps training checkpoints `step-K`, the others Hugging Face folders.
"""

import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from h3scale.checkpoint.consolidate import MANIFEST
from h3scale.checkpoint.shards import check_output
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.errors import OutputError
from h3scale.log import logger
from h3scale.train.agree import by_rank_0
from h3scale.train.dry_run import out_of_memory_told
from h3scale.train.engine import Run
from h3scale.train.run_facts import add_facts
from h3scale.train.save import add_to_manifest, write_checkpoint, write_folder
from h3scale.train.storage import writing

LAST = "last"  # folder of the last model beside the best one


class Keeper:
    """Writes the best models so far and the last one. Every rank calls its methods, with the same arguments."""

    def __init__(self, recipe: TrainRecipe, run: Run, loader: TypedLoader, run_folder: Path, out: Path, force: bool):
        self.recipe, self.run, self.loader = recipe, run, loader
        self.run_folder, self.out, self.force = run_folder, out, force
        self.best_step, self.best_nll = 0, math.inf
        self.keeps_best = bool(recipe.evaluation and recipe.evaluation.keep_best)

    def take(self, step: int, nll: float) -> None:
        """The model after `step` steps has this mean held-out NLL: kept if it is the best so far, and the one before is not."""
        if not self.keeps_best or not nll < self.best_nll:
            return
        before = self._folder(self.best_step) if self.best_nll < math.inf else None
        self._write(step, {"best": True, "heldout_nll": nll})
        self.best_step, self.best_nll = step, nll
        if before and self.run.rank == 0:  # only now that there is a better one
            for mark in (MANIFEST, "config.json"):  # first what says that it is complete
                (before / mark).unlink(missing_ok=True)
            shutil.rmtree(before, ignore_errors=True)

    def finish(self) -> Path:
        """Gives the run its name; what it leaves: the best step, or the last one."""
        steps, kept = self.recipe.steps, self.recipe.steps
        if self.best_nll < math.inf:
            kept = self.best_step
            if self.run.rank == 0:
                logger.info("kept: step %d, held-out lm %.4f; the last step, %d, is beside it", kept, self.best_nll, steps)
        if kept != steps or self.best_nll == math.inf:
            self._write(steps, {"best": False} if self.keeps_best else {})
        self._note({"ended": "done", "step": kept, "steps": steps})
        if self.run.zero_stage == 3:
            self._name()
            return self.out / self._folder(kept).name
        self._name(lambda: self._lay_out(kept))
        return self.out

    def finish_diverged(self, step: int) -> Path:
        """As `finish`, for a run that stops after `step` good steps: they are in the name and the manifest of what it leaves."""
        if step != self.best_step or self.best_nll == math.inf:
            self._write(step, {"ended": "diverged"} | ({"best": False} if self.keeps_best else {}))
        elif self.run.zero_stage == 3 and self.run.rank == 0:
            with writing(self.run_folder):
                add_to_manifest(self._folder(step), {"ended": "diverged"})
        self._note({"ended": "diverged", "step": step, "steps": self.recipe.steps})
        self._name()
        return self.out / self._folder(step).name

    def _folder(self, step: int) -> Path:
        return self.run_folder / f"step-{step:06d}"

    def _write(self, step: int, facts: dict[str, Any]) -> None:
        with writing(self.run_folder), out_of_memory_told(self.recipe, self.run, "saving"):
            if self.run.zero_stage == 3:
                write_checkpoint(self.run, self.recipe, self.loader, self._folder(step), step, facts)
            else:
                write_folder(self.run, self.recipe, self._folder(step))

    def _note(self, facts: dict[str, Any]) -> None:
        if self.run.rank == 0:
            with writing(self.run_folder):
                add_facts(self.run_folder, facts)

    def _name(self, first: Callable[[], None] = lambda: None) -> None:
        """Gives the run's folder its name, after what is to be done `first`. What it replaces is deleted when that is done."""

        def name() -> Path | None:
            first()
            return self._rename()

        before = by_rank_0(name, f"give {self.run_folder} its name")
        if before and self.run.rank == 0:
            if before.is_dir() and not before.is_symlink():
                shutil.rmtree(before, ignore_errors=True)
            else:
                before.unlink()

    def _lay_out(self, kept: int) -> None:
        """Makes the run's folder a model folder, with `last/` in it where another step is the best. For one rank only."""
        if kept != self.recipe.steps:
            self._folder(self.recipe.steps).rename(self.run_folder / LAST)
        for path in self._folder(kept).iterdir():
            path.rename(self.run_folder / path.name)
        self._folder(kept).rmdir()

    def _rename(self) -> Path | None:
        """The run's folder becomes `out`; what was there (--force) gets the name that is given. For one rank only."""
        left = f"what the run leaves is in {self.run_folder}"
        try:
            check_output(self.out, self.force)
        except OutputError as error:
            raise OutputError(f"{self.out}: was made by somebody else during the run; {left} (give it another name)") from error
        before = self.out.with_name(f".trash-{self.out.name}-{uuid.uuid4().hex[:8]}")
        replaces = self.force and os.path.lexists(self.out)
        try:
            if replaces:
                self.out.rename(before)
            self.run_folder.rename(self.out)
        except OSError as error:
            if replaces and not os.path.lexists(self.out) and os.path.lexists(before):
                before.rename(self.out)
            raise OutputError(f"{self.out}: cannot be made ({error.strerror}); {left}") from error
        return before if replaces else None


def open_folder(run_folder: Path, force: bool) -> None:
    """An empty folder for a run; OutputError (73) as `check_left`, or where it cannot be made."""
    check_left(run_folder, force)
    try:
        if run_folder.exists():
            shutil.rmtree(run_folder)
        run_folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{run_folder}: cannot be made ({error.strerror})") from error


def check_left(run_folder: Path, force: bool) -> None:
    """OutputError (73) where a run that did not end has left models, which a new run would delete."""
    marks = (f"step-*/{MANIFEST}", "step-*/config.json", f"{LAST}/config.json", "config.json")  # of what is complete
    left = next((path for mark in marks for path in sorted(run_folder.glob(mark))), None)
    if left and not force:
        raise OutputError(
            f"{left.parent}: left by a run that did not end, if none is going on (move it away, or --force to delete it)"
        )
