"""What asks a run to save or to end, on one rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from h3scale.train import stop
from h3scale.train.stop import Asked, Wish


def test_nothing_is_asked_by_itself(tmp_path: Path) -> None:
    with Asked(tmp_path, 0) as asked:
        assert asked.wish() is Wish.NONE
        assert not asked.wish()


@pytest.mark.parametrize(("number", "wish"), [(signal.SIGUSR2, Wish.USR2), (signal.SIGTERM, Wish.TERM), (signal.SIGINT, Wish.INT)])
def test_a_signal_ends_nothing_and_is_remembered(tmp_path: Path, number: int, wish: Wish) -> None:
    before = signal.getsignal(number)
    with Asked(tmp_path, 1) as asked:
        os.kill(os.getpid(), number)
        assert asked.wish() is wish
        assert wish.ends
        assert str(wish) == f"SIG{wish.name}"
        if wish is not Wish.INT:
            os.kill(os.getpid(), number)  # a second one lets the save finish
            assert asked.wish() is wish
    assert signal.getsignal(number) == before


def test_the_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with Asked(tmp_path, 0):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_rank_0_looks_for_files_which_are_gone_when_it_is_done(tmp_path: Path) -> None:
    with Asked(tmp_path, 0) as asked, Asked(tmp_path, 1) as other:
        (tmp_path / "SAVE").touch()
        assert asked.wish() is Wish.SAVE
        assert not asked.wish().ends
        (tmp_path / "STOP").touch()
        assert asked.wish() is Wish.END
        assert other.wish() is Wish.NONE
        asked.done(Wish.SAVE)  # what came meanwhile is still to be done
        assert asked.wish() is Wish.END
        (tmp_path / "SAVE").touch()
        asked.done(Wish.END)
        assert asked.wish() is Wish.NONE
    assert list(tmp_path.iterdir()) == []


def test_who_stops_a_run_for_good_is_heard_beside_a_signal(tmp_path: Path) -> None:
    with Asked(tmp_path, 0) as asked:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked.wish() is Wish.USR2
        (tmp_path / "STOP").touch()
        assert asked.wish() is Wish.END
        assert Wish.END is max(Wish)
        asked.done(Wish.USR2)
        assert (tmp_path / "STOP").exists()  # came after the ranks had agreed: for the next time


def test_a_lone_rank_agrees_with_itself(one_rank: None, tmp_path: Path) -> None:
    with Asked(tmp_path, 0) as asked:
        assert asked.together(torch.device("cpu")) == (Wish.NONE, 0, False)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked.together(torch.device("cpu")) == (Wish.USR2, 0, False)


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""
RANK = "from h3scale.train.stop import find_launcher; found = find_launcher(); print(found.pid if found else None, flush=True)"


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "other"])
@pytest.mark.parametrize("local_rank", [True, False])
def test_the_launcher_is_known_by_its_name_and_only_to_ranks(tmp_path: Path, name: str, local_rank: bool) -> None:
    script = tmp_path / name
    script.write_text(LAUNCHER)
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "SLURM_PROCID")}
    environment |= {"LOCAL_RANK": "0"} if local_rank else {}
    launcher = subprocess.Popen(
        [sys.executable, str(script), "x", RANK], stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[3]
    )
    said = launcher.communicate(timeout=60)[0].strip()
    assert said == (str(launcher.pid) if local_rank and name != "other" else "None")


def test_a_rank_whose_launcher_is_gone_asks_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(stop, "WATCH_S", 0.05)
    with Asked(tmp_path, 0, psutil.Process(launcher.pid)) as asked:
        assert asked.wish() is Wish.NONE
        launcher.kill()  # not waited for: a zombie is gone as well
        asked.closed.wait(0.5)
        assert asked.wish() is Wish.ORPHANED
        assert str(asked.wish()) == "the launcher is gone"
    launcher.wait()
