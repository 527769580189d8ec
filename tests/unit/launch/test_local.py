"""The ranks of one machine: started with a rank each, ended together, their exit code kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h3scale.launch.local import run_ranks


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run_ranks(python(code), 3) == 0
    said = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in said] == [[str(rank), str(rank), "3", "3"] for rank in range(3)]
    assert len({words[5] for words in said}) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_a_ranks_exit_code_is_kept_and_the_others_are_ended(failing: int) -> None:
    began = time.monotonic()
    assert run_ranks(python(f"sys.exit(78) if rank == {failing} else time.sleep(60)"), 2) == 78
    assert time.monotonic() - began < 30


def test_a_killed_rank_is_a_lost_peer() -> None:
    assert run_ranks(python("os.kill(os.getpid(), 9) if rank else time.sleep(60)"), 2) == 69


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_ranks_have_time_to_save_after_a_signal_and_say_how_it_went(tmp_path: Path, number: int) -> None:
    save = f"signal.signal({number}, lambda *_: (time.sleep(1 + rank), open(r'{tmp_path}/saved' + str(rank), 'w'), os._exit(75)))"
    inner = f"import signal; {save}; open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = started_launcher(inner, tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(30) == 75
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_sigterm_leaves_no_orphans(tmp_path: Path) -> None:
    launcher = started_launcher(f"open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid())); time.sleep(60)", tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 128 + signal.SIGTERM
    for file in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_the_terminals_ctrl_c_reaches_a_rank_once(tmp_path: Path) -> None:
    count = "got = []; signal.signal(signal.SIGINT, lambda *_: got.append(1))"
    wait = "\nwhile not got: time.sleep(0.02)\ntime.sleep(1); sys.exit(75 if len(got) == 1 else 70)"
    inner = f"import signal; {count}; open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid())){wait}"
    launcher = started_launcher(inner, tmp_path, own_group=True)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    assert launcher.wait(30) == 75


def started_launcher(inner: str, tmp_path: Path, own_group: bool = False) -> "subprocess.Popen[bytes]":
    """Two ranks that run `inner`, which leaves a file pid*; they have."""
    code = f"from h3scale.launch.local import run_ranks; import sys; sys.exit(run_ranks({python(inner)!r}, 2))"
    launcher = subprocess.Popen([sys.executable, "-c", code], process_group=0 if own_group else None)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    return launcher
