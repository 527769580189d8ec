"""One run at a time for an output: the run that has it says so in a file beside it, again and again while it lives.

Shared file systems need not know locks (flock) across nodes; all of them know files that are new and files that change.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from h3scale.errors import OutputError, TakenError

REFRESH_S = 30.0
SILENT_S = 600.0  # a run on another machine that has said nothing for so long has ended
CLOCK_S = 5.0  # by which the start of one process may be read differently twice


class Claim:
    """The right to write `out`, which one run has. For one rank only, but for leaving the context, which gives it back."""

    def __init__(self, out: Path):
        self.out, self.path = out, out.with_name(f".run-{out.name}.lock")
        self.ended = threading.Event()
        self.held = False

    def take(self) -> None:
        """TakenError (73) where another run has it; what a run has left that was killed is taken over."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._made() and not (self._freed() and self._made()):
                raise self._refused(_read(self.path))
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be made ({error.strerror})") from error
        self.held = True
        threading.Thread(target=self._refresh, daemon=True).start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.held:
            self.ended.set()
            self.held = False
            with suppress(OSError):  # in time it counts as given up
                self.path.unlink()

    def _made(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(this_process(), file)
        except FileExistsError:
            return False
        return True

    def _freed(self) -> bool:
        """Whether the file was that of a run which has ended; it is gone then."""
        holder = _read(self.path)
        aside = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex[:8]}")
        try:
            if is_running(holder, time.time() - self.path.stat().st_mtime):
                return False
            self.path.rename(aside)
        except FileNotFoundError:  # given back, or taken over by somebody else
            return True
        if _read(aside) != holder:  # a new run's, which took it over in between
            aside.rename(self.path)
            return False
        aside.unlink()
        return True

    def _refused(self, holder: dict[str, Any]) -> TakenError:
        job = f", job {holder['job']}" if holder.get("job") else ""
        who = f"process {holder['pid']} on {holder['host']}{job}" if "pid" in holder else "another process"
        return TakenError(
            f"{self.out}: a run is writing it ({who}; works: another out, or end that run; "
            f"one that was killed on another machine counts as running for {SILENT_S / 60:.0f} minutes)"
        )

    def _refresh(self) -> None:
        while not self.ended.wait(REFRESH_S):
            with suppress(OSError):
                os.utime(self.path)


def this_process() -> dict[str, Any]:
    """What others can tell from whether this process is still there."""
    try:
        pid_space = Path("/proc/self/ns/pid").stat().st_ino  # containers of one host name count processes apart
    except OSError:
        pid_space = 0
    return {
        "host": socket.gethostname(),
        "pid_space": pid_space,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "requeued": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def is_running(holder: dict[str, Any], silent_s: float) -> bool:
    """Whether a run still is, by what `this_process` was for it and how long it has said nothing."""
    own = this_process()
    if not holder:
        return silent_s < SILENT_S
    if all(holder[name] == own[name] for name in ("host", "pid_space")):
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < CLOCK_S
        except psutil.NoSuchProcess:
            return False
    if own["job"] and holder["job"] == own["job"] and holder["requeued"] < own["requeued"]:
        return False  # Slurm starts a job again when its former ranks are gone
    return silent_s < SILENT_S


def _read(path: Path) -> dict[str, Any]:
    """What `this_process` was for whoever wrote the file; nothing of one that is half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() == this_process().keys() else {}
