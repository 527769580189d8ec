"""Where a run works, and how it ended, in a file that scripts can trust: launchers lose exit codes. No torch here."""

import json
import os
from pathlib import Path
from typing import Any

EXIT_STATUS = "exit_status.json"


def run_folder_of(out: str | Path) -> Path:
    """The folder of a run while it goes on; it becomes `out` when the run has ended well."""
    path = Path(out) if Path(out).name else Path(out).absolute()
    return path.with_name(f".run-{path.name}")


def write_exit_status(folder: Path, exit_code: int, reason: str, step: int, steps: int) -> None:
    """Writes the file by atomic rename. `step`: the last one that is kept, of `steps`. Raises OSError."""
    status = {"exit_code": exit_code, "reason": reason, "step": step, "steps": steps} | this_attempt()
    partial = folder / f".partial-{EXIT_STATUS}-{os.getpid()}"
    partial.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / EXIT_STATUS)


def read_exit_status(out: str | Path) -> dict[str, Any] | None:
    """How this attempt at a run ended (the same Slurm job and restart); None where no such file is there."""
    for folder in (run_folder_of(out), Path(out)):
        try:
            status = json.loads((folder / EXIT_STATUS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(status, dict) and {k: status.get(k) for k in this_attempt()} == this_attempt() and "exit_code" in status:
            return status
    return None


def kept_step(out: str | Path) -> int:
    """The newest step that is saved of a run which has not ended; 0 for none."""
    marks = [path for kind in ("step", "resume") for path in run_folder_of(out).glob(f"{kind}-*/manifest.json")]
    return max((int(path.parent.name.split("-")[1]) for path in marks), default=0)


def this_attempt() -> dict[str, Any]:
    """What tells one attempt at a run from another: the Slurm job, and how often it has been started again."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
