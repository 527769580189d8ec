"""Carries a study out, or says what it would do: every command is printed, and run once."""

import fcntl
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from h3scale.errors import H3Error, OutputError, TakenError, UnsafeError
from h3scale.study.estimate import duration, estimate_s, rates
from h3scale.study.ledger import Ledger, keys_of, states
from h3scale.study.steps import executable
from h3scale.study.tasks import Plan, Task

MARKER = ".h3scale-study"  # only in a folder that has it is anything ever deleted


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The study's folder, made where it is not there, for one study at a time.

    UnsafeError (77) for a folder with something else in it, TakenError (73) where another study runs, OutputError (73).
    """
    marker = out / MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UnsafeError(f"{out}: not made by h3scale study (works: another --out)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = marker.open("a")
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TakenError(f"{out}: another study runs there (works: wait for it, or another --out)") from None
        yield


def show_plan(plan: Plan, out: Path, console: Console) -> None:
    """All tasks with their state, their time and their command, and how long the rest will take. Writes nothing."""
    ledger, keys = Ledger(out), keys_of(plan)
    done, entries = states(plan, keys, ledger), ledger.entries()
    known = rates(entries)
    left = [task for task in plan.tasks if not done[task.name]]
    _say(console, f"$ cd {shlex.quote(str(out.resolve()))}", "dim")
    for number, task in enumerate(plan.tasks, start=1):
        state = "done" if done[task.name] else f"about {duration(estimate_s(task, known))}"
        _say(console, f"{number}/{len(plan.tasks)}  {task.why}  [{state}]", "bold")
        _say(console, f"$ {shlex.join(task.command)}", "cyan")
    measured = sorted({entry.kind for entry in entries if entry.took_s is not None} & {task.kind for task in left})
    of_what = (
        f"measured here: {', '.join(measured)}; the others as stated" if measured else "from stated rates, nothing measured here"
    )
    total = duration(sum(estimate_s(task, known) for task in left))
    _say(console, f"\n{len(left)} of {len(plan.tasks)} steps left, about {total} ({of_what})", "bold")


def run_plan(plan: Plan, out: Path, console: Console) -> Ledger:
    """Runs what is not done. Raises the failed command's exit code as an H3Error; what is finished stays."""
    ledger, keys = Ledger(out), keys_of(plan)
    _say(console, f"$ cd {shlex.quote(str(out.resolve()))}", "dim")
    for number, task in enumerate(plan.tasks, start=1):
        entry = ledger.entry(task)
        _say(console, f"\n{number}/{len(plan.tasks)}  {task.why}", "bold")
        _say(console, f"$ {shlex.join(task.command)}", "cyan")
        if ledger.is_done(task, keys[task.name]):
            if entry is not None and not entry.done:
                ledger.end(task, keys[task.name], None)
            _say(console, f"there already: {task.makes[0]}", "dim")
            continue
        ledger.begin(task, keys[task.name])
        took_s = _run(task, number, out)
        ledger.end(task, keys[task.name], took_s)
        _say(console, f"{took_s:.0f} s", "dim")
    return ledger


def _run(task: Task, number: int, out: Path) -> float:
    for made in task.makes:
        (out / made).parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    code = subprocess.run(executable(task.command), cwd=out, check=False).returncode
    if code or not (out / task.makes[0]).exists():
        code = code or 70
        failure = H3Error(
            f"step {number} ended with exit code {code}: {shlex.join(task.command)} (the same h3scale study goes on here)"
        )
        failure.exit_code = code if code > 0 else 128 - code
        raise failure
    return time.monotonic() - began


def _say(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)  # a command is to be copied as it is
    console.file.flush()  # before what the command itself says
