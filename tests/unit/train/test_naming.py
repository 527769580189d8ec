"""A run's folder becomes its output: a kill at any moment leaves the old one or the new one, and a start finishes the rest."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from h3scale.checkpoint.manifest import write_manifest
from h3scale.errors import DivergedError, OutputError
from h3scale.exit_status import ended_before, read_exit_status, write_exit_status
from h3scale.train import naming
from h3scale.train.naming import finish_ended, lay_out, settle, take_name

MOVES = ("rename", "unlink", "rmdir")  # of os: all that these functions do to names, but for the exchange


class Killed(BaseException):
    """Instead of SIGKILL: nothing in between handles it."""


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Raises Killed instead of the `number`-th move from now on."""
    moves = iter(range(number + 1))

    def stopped(plain: Callable[..., Any]) -> Callable[..., Any]:
        def move(*args: Any, **more: Any) -> Any:
            if next(moves, None) == number:
                raise Killed
            return plain(*args, **more)

        return move

    for name in MOVES:
        patch.setattr(os, name, stopped(getattr(os, name)))
    patch.setattr(naming, "exchange", stopped(naming.exchange))


def cannot_exchange(_one: Path, _other: Path) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def ended(folder: Path, steps: int = 4, kept: int = 2, how: str = "done") -> Path:
    """The folder of a run without ZeRO-3 that has ended, with a checkpoint that it could have gone on from."""
    run_folder = folder / ".run-x"
    for name, text in ((f"step-{kept:06d}", "kept"), (f"step-{steps:06d}", "last"), ("resume-000003", "state")):
        (run_folder / name).mkdir(parents=True, exist_ok=True)
        (run_folder / name / "config.json").write_text(text)
        (run_folder / name / "model.safetensors").write_text(text)
    write_manifest(run_folder / "resume-000003", {"step": 3})
    (run_folder / "run.json").write_text(json.dumps({"ended": how, "step": kept, "steps": steps}))
    write_exit_status(run_folder, 0, how, kept, steps)
    return run_folder


def old(folder: Path) -> Path:
    (folder / "x").mkdir()
    (folder / "x" / "old.txt").write_text("old")
    return folder / "x"


def is_old(out: Path) -> bool:
    return (out / "old.txt").is_file()


def is_new(out: Path) -> bool:
    return (out / "config.json").is_file() and (out / "config.json").read_text() == "kept"


@pytest.mark.parametrize("number", range(12))
def test_a_run_that_is_killed_at_any_move_of_its_end_is_named_by_the_next_start(tmp_path: Path, number: int) -> None:
    run_folder, out = ended(tmp_path), tmp_path / "x"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, number)
        try:
            lay_out(run_folder, 2, 4)
            take_name(run_folder, out, False)
        except Killed:
            assert not out.exists()
    if not out.exists() and not finish_ended(run_folder, out, False):
        assert list(run_folder.glob("resume-*/manifest.json"))  # it goes on from there
        return
    assert is_new(out)
    assert (out / "last" / "config.json").read_text() == "last"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "exit_status.json", "last", "model.safetensors", "run.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("exchanges", [True, False])
def test_with_force_a_kill_at_any_move_leaves_the_old_output_or_the_new_one(tmp_path: Path, number: int, exchanges: bool) -> None:
    run_folder, out = ended(tmp_path, kept=4), old(tmp_path)
    lay_out(run_folder, 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        if not exchanges:
            patch.setattr(naming, "exchange", cannot_exchange)
        kill_at(patch, number)
        try:
            take_name(run_folder, out, True)
        except Killed:
            assert not exchanges or out.exists()  # else between two renames it is at neither, until a start
    settle(run_folder, out)
    assert is_old(out) or (out / "config.json").read_text() == "last"
    if is_old(out):
        assert finish_ended(run_folder, out, True)
    assert (out / "config.json").read_text() == "last"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert not json.loads((out / "run.json").read_text())["replaces"]


def test_between_an_exchange_and_what_follows_it_the_output_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run_folder, out = ended(tmp_path), old(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naming, "settle", lambda *_: None)  # the kill
        take_name(run_folder, out, True)
    assert is_old(run_folder)
    status = read_exit_status(out)
    assert status is not None
    assert status["reason"] == "done"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ended_before(out)


def test_a_diverged_run_that_is_named_by_a_later_start_says_that_it_diverged(tmp_path: Path) -> None:
    run_folder, out = ended(tmp_path, how="diverged"), tmp_path / "x"
    naming.leave_only(run_folder, {2})
    with pytest.raises(DivergedError, match=r"the model after step 2 is in .*/x/step-000002"):
        finish_ended(run_folder, out, False)
    assert sorted(path.name for path in out.iterdir()) == ["exit_status.json", "run.json", "step-000002"]


def test_a_run_that_has_not_ended_is_not_named(tmp_path: Path) -> None:
    run_folder = ended(tmp_path, how="saved")
    naming.leave_only(run_folder, {2})
    assert not finish_ended(run_folder, tmp_path / "x", False)
    assert not finish_ended(tmp_path / ".run-y", tmp_path / "y", False)
    (run_folder / "run.json").write_text('{"ended": "do')  # torn by a power cut
    assert not finish_ended(run_folder, tmp_path / "x", False)
    assert (run_folder / "step-000002" / "config.json").is_file()


def test_what_somebody_else_has_made_stays_also_when_a_later_start_names_the_run(tmp_path: Path) -> None:
    run_folder, out = ended(tmp_path), old(tmp_path)
    naming.leave_only(run_folder, {2, 4})
    with pytest.raises(OutputError, match="made by somebody else"):
        finish_ended(run_folder, out, False)
    assert is_old(out)
