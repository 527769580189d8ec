"""How the folder of a run that has ended becomes `out`, and how a start finishes what a kill has interrupted in that.

Before anything is moved, run.json says how the run ended, and what `out` was (`replaces`). All here is for one rank only.
"""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from h3scale.checkpoint.shards import CANNOT_EXCHANGE, check_output, exchange, sync_one
from h3scale.errors import DivergedError, OutputError
from h3scale.exit_status import DIVERGED, DONE, REPLACES, checkpoints_in, is_replaced
from h3scale.log import logger
from h3scale.train.run_facts import add_facts, read_facts
from h3scale.train.storage import writing

LAST = "last"  # folder of the last model beside the best one


def step_folder(run_folder: Path, step: int) -> Path:
    """Where a run keeps the model after so many steps."""
    return run_folder / f"step-{step:06d}"


def leave_only(run_folder: Path, steps: set[int]) -> None:
    """Deletes all checkpoints but those of these steps."""
    for path in [*run_folder.glob("step-*"), *run_folder.glob("resume-*")]:
        if path not in {step_folder(run_folder, step) for step in steps}:
            delete(path)


def lay_out(run_folder: Path, kept: int, last: int) -> None:
    """Makes a run's folder the model folder of step `kept`, with `last/` in it where that is another one.

    Does what is left to do where it was interrupted.
    """
    leave_only(run_folder, {kept, last})
    if kept != last and step_folder(run_folder, last).exists():
        step_folder(run_folder, last).rename(run_folder / LAST)
    if step_folder(run_folder, kept).exists():
        for path in step_folder(run_folder, kept).iterdir():
            path.rename(run_folder / path.name)
        step_folder(run_folder, kept).rmdir()


def take_name(run_folder: Path, out: Path, force: bool) -> None:
    """The run's folder becomes `out`; what was there (`force`) is deleted then. OutputError (73) where that cannot be.

    Where the file system can exchange two names there is no moment without one of them at `out`; where it cannot, a start puts
    back what was there (`settle`).
    """
    left = f"what the run leaves is in {run_folder}"
    try:
        check_output(out, force)
    except OutputError as error:
        raise OutputError(f"{out}: was made by somebody else during the run; {left} (give it another name)") from error
    try:
        if force and os.path.lexists(out):
            _replace(run_folder, out)
        else:
            run_folder.rename(out)
        sync_one(out.absolute().parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); {left}") from error
    try:
        settle(run_folder, out)
    except OSError as error:  # the next start of a run for this output does it
        logger.warning("%s: what it has replaced is not deleted (%s)", out, error.strerror)


def settle(run_folder: Path, out: Path) -> None:
    """Deletes what `out` has replaced; or, where the run was ended between two renames, puts back what was at `out`."""
    note = (read_facts(out) if out.is_dir() else {}).get(REPLACES)
    if note:
        aside = out.with_name(note["aside"])
        if is_replaced(out):
            run_folder.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        add_facts(out, {REPLACES: None})
        return
    note = (read_facts(run_folder) if run_folder.is_dir() else {}).get(REPLACES)
    if note and not os.path.lexists(out):
        with suppress(FileNotFoundError):
            out.with_name(note["aside"]).rename(out)
            logger.warning("%s: is again what it was before a run was ended while it replaced it", out)


def finish_ended(run_folder: Path, out: Path, force: bool) -> bool:
    """Names a run that has ended, and was killed after it had deleted its checkpoints; False where there is no such run.

    DivergedError (76) for one that has diverged, as it would have said.
    """
    facts = read_facts(run_folder) if run_folder.is_dir() else {}
    if facts.get("ended") not in (DONE, DIVERGED) or checkpoints_in(run_folder):
        return False
    kept = facts["step"]
    with writing(run_folder):
        if facts["ended"] == DONE:
            lay_out(run_folder, kept, facts["steps"])
        for path in run_folder.glob(".trash-*"):
            shutil.rmtree(path, ignore_errors=True)
    take_name(run_folder, out, force)
    if facts["ended"] == DIVERGED:
        raise DivergedError(f"{out}: diverged in an earlier start; the model after step {kept} is in {step_folder(out, kept)}")
    logger.info("%s: the run had ended, and has its name now", out)
    return True


def delete(path: Path) -> None:
    """Out of sight first, by one rename: what is half deleted is no checkpoint."""
    aside = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _replace(run_folder: Path, out: Path) -> None:
    aside = out.with_name(f".trash-{out.name}-{uuid.uuid4().hex[:8]}")
    add_facts(run_folder, {REPLACES: {"inode": os.lstat(out).st_ino, "aside": aside.name}})
    try:
        exchange(run_folder, out)
    except OSError as error:
        if error.errno not in CANNOT_EXCHANGE:
            raise
        out.rename(aside)
        try:
            run_folder.rename(out)
        except OSError:
            aside.rename(out)
            raise
