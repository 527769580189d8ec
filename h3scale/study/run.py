"""Carries a study out, or says what it would do: every command is printed, and run once."""

import fcntl
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from h3scale.errors import H3Error, OutputError, TakenError, UnsafeError
from h3scale.launch.local import SIGNALS
from h3scale.study.estimate import duration, estimate_s, rates
from h3scale.study.ledger import Ledger, keys_of, states
from h3scale.study.tasks import Plan, Task, executable

MARKER = ".h3scale-study"  # only in a folder that has it is anything ever deleted


@contextmanager
def claimed(out: Path, of: str = "", force: bool = False) -> Iterator[int]:
    """The study's folder, made where it is not there, for one study at a time; gives the lock, for the commands to hold too.

    `of`: what is studied, which is noted there. UnsafeError (77) for a folder with something else in it, or with another study
    unless `force`; TakenError (73) where another runs, OutputError (73).
    """
    marker = out / MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UnsafeError(f"{out}: not made by h3scale study (works: another --out)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = marker.open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TakenError(f"{out}: another study runs there (works: wait for it, or another --out)") from None
        lock.seek(0)
        before = lock.read().strip()
        if before and of and before != of and not force:
            raise UnsafeError(
                f"{out}: is of another study: {before} (works: another --out, or --force: what differs is made again)"
            )
        if of and before != of:
            lock.truncate(0)
            lock.write(of)
            lock.flush()
        yield lock.fileno()


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


def run_plan(plan: Plan, keys: Mapping[str, str], out: Path, console: Console, lock: int | None = None) -> Ledger:
    """Runs what is not done, by `keys_of`. Raises the failed command's exit code as an H3Error; what is finished stays.

    A command holds the `lock` as well: where the study alone was killed, another one waits for what it had started.
    """
    ledger = Ledger(out)
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
        before_s = ledger.spent_s(task, keys[task.name])
        ledger.begin(task, keys[task.name])
        began, is_done = time.monotonic(), False
        try:
            _run(task, number, out, lock)
            is_done = True
        finally:
            took_s = time.monotonic() - began
            ledger.end(task, keys[task.name], None if before_s is None else before_s + took_s, is_done)
        _say(console, f"{took_s:.0f} s", "dim")
    return ledger


def _run(task: Task, number: int, out: Path, lock: int | None) -> None:
    for made in task.makes:
        (out / made).parent.mkdir(parents=True, exist_ok=True)
    # Not of the terminal's group: Ctrl-C would come from there and from here, and the second one ends a training run unsaved.
    held = () if lock is None else (lock,)
    with subprocess.Popen(executable(task.command), cwd=out, process_group=0, pass_fds=held) as process, _forwarding(process):
        code = process.wait()
    if code or not (out / task.makes[0]).exists():
        code = code or 70
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        failure = H3Error(f"step {number} {how}: {shlex.join(task.command)} (the same h3scale study goes on here)")
        failure.exit_code = code if code > 0 else 128 - code
        raise failure


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that ask the study to end go to its command, which may take its time to save."""

    def forward(number: int, _frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)  # a command is to be copied as it is
    console.file.flush()  # before what the command itself says
