"""Where a run works, and how it ended, in a file that scripts can trust: launchers lose exit codes. No torch here."""

import json
import os
import re
from pathlib import Path
from typing import Any

from h3scale.redact import without_secrets

EXIT_STATUS = "exit_status.json"
FACTS = "run.json"
DONE, DIVERGED = "done", "diverged"  # reasons that are true when the run's folder has its name
BEGUN = "has begun, and has not said how it ended"
BEGUN_CODE = 69  # of a rank that was killed: what a run says of itself until it says something else
REPLACES = "replaces"  # of run.json: what `out` was, while the run's folder takes its place


def run_folder_of(out: str | Path) -> Path:
    """The folder of a run while it goes on; it becomes `out` when the run has ended well."""
    path = Path(out) if Path(out).name else Path(out).absolute()
    return path.with_name(f".run-{path.name}")


def write_exit_status(folder: Path, exit_code: int, reason: str, step: int, steps: int) -> None:
    """Writes the file by atomic rename, durably. `step`: the last one that is kept, of `steps`. Raises OSError."""
    status = {"exit_code": exit_code, "reason": without_secrets(reason), "step": step, "steps": steps} | this_attempt()
    partial = folder / f".partial-{EXIT_STATUS}-{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(status, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / EXIT_STATUS)


def read_exit_status(out: str | Path) -> dict[str, Any] | None:
    """How this attempt at a run ended (the same Slurm job and restart); None where no such file is there, or it is torn.

    Until a run says how it ended, the reason is BEGUN: that stays when it is killed.

    While there is a run's folder, what `out` says is of another run.
    """
    unnamed = run_folder_of(out).is_dir() and not is_replaced(out)
    try:
        status = json.loads(((run_folder_of(out) if unnamed else Path(out)) / EXIT_STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or not {"exit_code", "reason"} <= status.keys():
        return None
    if unnamed and status["reason"] in (DONE, DIVERGED):
        return None
    return status if {name: status.get(name) for name in this_attempt()} == this_attempt() else None


def ended_before(out: str | Path) -> bool:
    """Whether this Slurm job has made `out` in an earlier start, and was started again before it could end."""
    attempt = this_attempt()
    try:
        status = json.loads((Path(out) / EXIT_STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not attempt["job"] or not isinstance(status, dict):
        return False
    if run_folder_of(out).is_dir() and not is_replaced(out):
        return False
    same = status.get("job") == attempt["job"] and status.get("reason") == DONE
    return same and int(status.get("restart", 0)) < int(attempt["restart"])


def is_replaced(out: str | Path) -> bool:
    """Whether what is in the place of a run's folder is what `out` has replaced, by an exchange of the two names."""
    try:
        note = json.loads((Path(out) / FACTS).read_text(encoding="utf-8"))[REPLACES]
        return bool(note["inode"] == run_folder_of(out).lstat().st_ino)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoints_in(run_folder: Path, *kinds: str) -> dict[Path, int]:
    """The folders of checkpoints (`step-K`, `resume-K` or one of these) that are whole, and the steps; the newest first."""
    names = re.compile(rf"(?:{'|'.join(kinds or ('step', 'resume'))})-(\d+)")
    found = {path.parent: names.fullmatch(path.parent.name) for path in run_folder.glob("*/manifest.json")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return dict(sorted(steps.items(), key=lambda item: item[1], reverse=True))


def kept_step(out: str | Path) -> int:
    """The newest step that is saved of a run which has not ended; 0 for none."""
    return next(iter(checkpoints_in(run_folder_of(out)).values()), 0)


def this_attempt() -> dict[str, Any]:
    """What tells one attempt at a run from another: the Slurm job, and how often it has been started again."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
