"""Two runs of one output: the second is refused while the first lives, and takes over from one that was killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from h3scale.errors import OutputError
from h3scale.train import claim
from h3scale.train.claim import SILENT_S, Claim, is_running, this_process


def lock_of(out: Path) -> Path:
    return out.with_name(f".run-{out.name}.lock")


def test_a_second_run_of_an_output_is_refused_until_the_first_gives_it_back(tmp_path: Path) -> None:
    out = tmp_path / "models" / "run"
    with Claim(out) as first:
        first.take()
        with Claim(out) as second, pytest.raises(OutputError) as caught:
            second.take()
        assert caught.value.exit_code == 73
        assert caught.value.findings[0].startswith(f"{out}: a run is writing it (process {os.getpid()} on ")
        assert lock_of(out).exists()  # the second did not give back what it had not
        with Claim(tmp_path / "models" / "other") as other:
            other.take()
    assert list(out.parent.iterdir()) == []
    with Claim(out) as third:
        third.take()


def test_what_a_killed_run_held_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = f"import os, pathlib, h3scale.train.claim as c; c.Claim(pathlib.Path({str(out)!r})).take(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert lock_of(out).exists()
    with Claim(out) as second:
        second.take()
        assert json.loads(lock_of(out).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_took_over_in_between_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lock_of(tmp_path / "run")
    path.write_text(json.dumps(this_process() | {"pid": 1, "host": "gone"}))

    def taken_meanwhile(*_: Any) -> bool:
        path.write_text(json.dumps(this_process()))
        return False

    monkeypatch.setattr(claim, "is_running", taken_meanwhile)
    with Claim(tmp_path / "run") as late, pytest.raises(OutputError, match="a run is writing it"):
        late.take()
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_process_of_this_machine_is_asked_and_of_another_one_its_last_word_counts() -> None:
    own = this_process()
    assert is_running(own, silent_s=10 * SILENT_S)  # stopped, or waiting for hours
    assert not is_running(own | {"started": own["started"] - 1000}, silent_s=1)  # its number is another process's now
    for elsewhere in (own | {"host": "another"}, own | {"pid_space": own["pid_space"] + 1}, {}):
        assert is_running(elsewhere, silent_s=SILENT_S - 1)
        assert not is_running(elsewhere, silent_s=SILENT_S + 1)


def test_a_job_that_slurm_has_put_back_does_not_wait_for_its_former_self(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = this_process() | {"host": "another"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_running(before, silent_s=1)
    assert is_running(before | {"requeued": 1}, silent_s=1)  # a second step of the same job
    assert is_running(before | {"job": "18"}, silent_s=1)


def test_a_run_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "REFRESH_S", 0.01)
    with Claim(tmp_path / "run") as held:
        held.take()
        os.utime(held.path, (0, 0))
        deadline = time.monotonic() + 30
        while held.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held.path.stat().st_mtime > 0


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Claim(tmp_path / "file" / "run") as held, pytest.raises(OutputError, match="run: cannot be made"):
        held.take()
