"""Carrying a study out: printed, once, stopped and gone on with, and nothing of anybody else's is deleted."""

import io
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from h3scale.errors import H3Error, TakenError, UnsafeError
from h3scale.study.estimate import START_S, STATED_S, duration, rates
from h3scale.study.ledger import Entry, Ledger, keys_of
from h3scale.study.run import MARKER, claimed, run_plan, show_plan
from h3scale.study.tasks import Plan, Task


def task(name: str, needs: tuple[str, ...] = (), text: str = "x", also: str = "", work: float = 1) -> Task:
    """A command that adds to a file of its name, and counts its runs in another."""
    code = f"open('{name}','a').write('{text}'); open('{name}.runs','a').write('1'); {also}"
    return Task(name, f"make {name}", [sys.executable, "-c", code], (name,), "merge", work, needs)


def run(out: Path, *tasks: Task) -> str:
    said = io.StringIO()
    out.mkdir(exist_ok=True)
    plan = Plan(list(tasks), [])
    run_plan(plan, keys_of(plan), out, Console(file=said, width=200, highlight=False))
    return said.getvalue()


def runs(out: Path, name: str) -> int:
    return len((out / f"{name}.runs").read_text())


def test_each_command_is_printed_and_a_finished_one_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, task("a"), task("b", ("a",)))
    again = run(tmp_path, task("a"), task("b", ("a",)))
    assert shlex.join(task("b").command) in first
    assert again.count("there already") == 2
    assert runs(tmp_path, "a") == runs(tmp_path, "b") == 1


def test_a_changed_command_runs_again_with_what_needs_it_and_from_nothing(tmp_path: Path) -> None:
    run(tmp_path, task("a"), task("b", ("a",)), task("c"))
    run(tmp_path, task("a", text="y"), task("b", ("a",)), task("c"))
    assert (tmp_path / "a").read_text() == "y", "the old result was added to"
    assert [runs(tmp_path, name) for name in "abc"] == [2, 2, 1]


def test_a_failure_has_its_exit_code_and_the_same_study_goes_on_there(tmp_path: Path) -> None:
    with pytest.raises(H3Error, match="step 2 ended with exit code 65") as caught:
        run(tmp_path, task("a"), task("b", ("a",), also="raise SystemExit(65)"), task("c", ("b",)))
    assert caught.value.exit_code == 65
    assert not (tmp_path / "c").exists()
    run(tmp_path, task("a"), task("b", ("a",)), task("c", ("b",)))
    assert runs(tmp_path, "a") == runs(tmp_path, "c") == 1


def test_a_command_that_leaves_nothing_behind_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(H3Error, match="step 1 ended"):
        run(tmp_path, Task("a", "make a", [sys.executable, "-c", ""], ("a",), "merge"))


def test_what_was_whole_when_the_study_was_killed_is_not_made_again_and_its_time_is_not_known(tmp_path: Path) -> None:
    run(tmp_path, task("a"))
    ledger = Ledger(tmp_path)
    before = ledger.entry(task("a"))
    assert before is not None
    assert before.took_s is not None
    (tmp_path / "a").unlink()
    ledger.begin(task("a"), before.key)
    (tmp_path / "a").write_text("whole")
    run(tmp_path, task("a"))
    after = ledger.entry(task("a"))
    assert runs(tmp_path, "a") == 1
    assert after == Entry(before.key, "merge", 1, True, None, before.code)


def test_what_a_killed_command_left_stays_for_the_same_and_goes_for_another(tmp_path: Path) -> None:
    run(tmp_path, task("a"))
    left, others = [tmp_path / name for name in (".run-a", ".partial-a", ".partial-a-0a1b", "a.scored")], tmp_path / ".partial-ab"
    for folder in (*left, others):
        folder.mkdir()
    (tmp_path / "a").unlink()
    run(tmp_path, task("a"))
    assert all(folder.is_dir() for folder in left), "a training run could not go on"
    run(tmp_path, task("a", text="y"))
    assert not any(folder.exists() for folder in left)
    assert others.is_dir()


def test_a_second_result_does_not_outlive_the_first(tmp_path: Path) -> None:
    """A search whose merge was cut off would refuse to write where it has written."""
    code = "from pathlib import Path; Path('why').mkdir(); Path('model').write_text('x')"
    searched = Task("a", "search", [sys.executable, "-c", code], ("model", "why"), "searched")
    run(tmp_path, searched)
    (tmp_path / "model").unlink()
    run(tmp_path, searched)
    assert (tmp_path / "model").exists()


def test_a_folder_of_anybody_elses_is_refused_and_one_study_runs_in_it_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(UnsafeError, match="not made by h3scale study"), claimed(tmp_path / "mine"):
        pass
    with claimed(tmp_path / "study"):
        assert (tmp_path / "study" / MARKER).is_file()
        with pytest.raises(TakenError), claimed(tmp_path / "study"):
            pass
    with claimed(tmp_path / "study"):
        pass


def test_another_studys_folder_is_not_written_over_unless_it_is_said(tmp_path: Path) -> None:
    out = tmp_path / "study"
    with claimed(out, "builtin.yaml"):
        pass
    with pytest.raises(UnsafeError, match=r"is of another study: builtin\.yaml "), claimed(out, "builtin.yaml --quick"):
        pass
    with claimed(out, "builtin.yaml"):
        pass
    with claimed(out, "builtin.yaml --quick", force=True):
        pass
    with claimed(out, "builtin.yaml --quick"):
        pass


def test_the_time_of_a_task_is_all_that_went_into_it(tmp_path: Path) -> None:
    """One that was stopped adds to what it took before; of one that was killed nobody knows."""
    stops = "import os; assert os.path.exists('a.stopped') or (open('a.stopped', 'w'), exit(75))"
    first = task("a", also=stops)
    with pytest.raises(H3Error):
        run(tmp_path, first)
    ledger = Ledger(tmp_path)
    stopped = ledger.entry(first)
    assert stopped is not None
    assert not stopped.done
    assert stopped.took_s is not None
    (tmp_path / "a").unlink()
    ledger.end(first, stopped.key, 100.0, done=False)
    run(tmp_path, first)
    after = ledger.entry(first)
    assert after is not None
    assert after.took_s is not None
    assert 100.0 < after.took_s < 160.0
    (tmp_path / "a").unlink()
    ledger.begin(first, stopped.key)
    run(tmp_path, first)
    killed = ledger.entry(first)
    assert killed is not None
    assert killed.done
    assert killed.took_s is None


STARTED = """
import sys
from pathlib import Path
from rich.console import Console
from h3scale.errors import H3Error
from h3scale.study.ledger import keys_of
from h3scale.study.run import claimed, run_plan
from h3scale.study.tasks import Plan, Task

code = sys.argv[2]
try:
    with claimed(Path(sys.argv[1])) as lock:
        plan = Plan([Task("a", "wait", [sys.executable, "-c", code], ("a",), "merge")], [])
        run_plan(plan, keys_of(plan), Path(sys.argv[1]), Console(), lock)
except H3Error as error:
    print(error)
    sys.exit(error.exit_code)
"""
WAITS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('up', 'w'); time.sleep(60)"


def started(out: Path) -> subprocess.Popen[str]:
    """A study whose one command waits, and saves when it is asked to end; given when the command runs."""
    process = subprocess.Popen([sys.executable, "-c", STARTED, str(out), WAITS], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "up").exists():
        time.sleep(0.02)
    assert process.poll() is None
    return process


def test_a_signal_reaches_the_command_whose_exit_code_is_given(tmp_path: Path) -> None:
    study = started(tmp_path / "study")
    study.send_signal(signal.SIGTERM)
    said, _ = study.communicate(timeout=60)
    assert study.returncode == 75
    assert "the same h3scale study goes on here" in said


def test_a_command_that_outlives_its_study_keeps_others_out(tmp_path: Path) -> None:
    out = tmp_path / "study"
    study = started(out)
    command = psutil.Process(study.pid).children()[0]
    study.kill()
    study.wait()
    with pytest.raises(TakenError), claimed(out):
        pass
    command.terminate()
    psutil.wait_procs([command], timeout=60)
    study.communicate()
    with claimed(out):
        pass


def test_a_dry_run_says_what_is_left_and_how_long_and_writes_nothing(tmp_path: Path) -> None:
    out, said = tmp_path / "study", io.StringIO()
    tasks = [task("a"), task("b", ("a",), work=10)]
    show_plan(Plan(tasks, []), out, Console(file=said, width=300, highlight=False))
    assert not out.exists()
    assert f"2 of 2 steps left, about {duration(2 * START_S + 11 * STATED_S['merge'])} (from stated rates" in said.getvalue()
    run(out, tasks[0])
    ledger = Ledger(out)
    entry = ledger.entry(tasks[0])
    assert entry is not None
    ledger.end(tasks[0], entry.key, START_S + 30)
    said.truncate(0)
    show_plan(Plan(tasks, []), out, Console(file=said, width=300, highlight=False))
    assert "1 of 2 steps left, about 5 min (measured here: merge" in said.getvalue()
    assert "make a  [done]" in said.getvalue()


def test_rates_are_measured_where_something_has_ended_and_work_counts() -> None:
    known = rates(
        [Entry("", "merge", 1, True, START_S + 5), Entry("", "merge", 3, True, START_S + 15), Entry("", "merge", 1, True)]
    )
    assert known["merge"] == 5.0
    assert known["fuse"] == STATED_S["fuse"]
    assert [duration(s) for s in (40, 700, 12_000)] == ["40 s", "12 min", "3 h 20 min"]
