"""What a rank's program leaves behind when it fails, for scripts whose launcher loses exit codes."""

from pathlib import Path
from typing import Any, cast

import pytest

from h3scale.errors import DataError, H3Error, PeerLostError, TakenError
from h3scale.exit_status import BEGUN, BEGUN_CODE, read_exit_status, run_folder_of, write_exit_status
from h3scale.train import __main__ as program
from h3scale.train import loop


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run_folder_of(tmp_path / "x").mkdir()
    return tmp_path / "x"


def fails(monkeypatch: pytest.MonkeyPatch, out: Path, *errors: H3Error) -> int:
    """The exit code of a rank that fails with the first of the errors; other ranks say the rest before."""

    def train(*_: Any) -> Path:
        for error in errors[1:]:
            write_exit_status(run_folder_of(out), error.exit_code, error.findings[0], 0, 9)
        raise errors[0]

    monkeypatch.setattr(loop, "train", train)
    return program.main(["recipes/demo/train.yaml", f"out={out}"])


def said(out: Path) -> tuple[int, str] | None:
    status = read_exit_status(out)
    return (status["exit_code"], status["reason"]) if status else None


def test_how_an_earlier_start_ended_is_replaced(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    write_exit_status(run_folder_of(out), 75, "SIGUSR2 on rank 0", 3, 9)
    assert fails(monkeypatch, out, DataError("broken")) == 65
    assert said(out) == (65, "broken")


def test_what_another_rank_has_said_stays_unless_it_only_lost_a_peer(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    assert fails(monkeypatch, out, DataError("this one"), DataError("the first")) == 65
    assert said(out) == (65, "the first")
    assert fails(monkeypatch, out, PeerLostError("where is it"), DataError("broken")) == 69
    assert said(out) == (65, "broken")
    assert fails(monkeypatch, out, DataError("the cause"), PeerLostError("where is it")) == 65
    assert said(out) == (65, "the cause")


def test_nothing_is_written_into_the_folder_of_another_run(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    assert fails(monkeypatch, out, TakenError("a run is writing it")) == 73
    assert said(out) is None


def test_that_a_run_has_begun_is_said_until_it_ends_and_replaced_by_anything(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    begun = PeerLostError(BEGUN)
    assert fails(monkeypatch, out, PeerLostError("where is it"), begun) == 69
    assert said(out) == (69, "where is it")
    assert fails(monkeypatch, out, DataError("broken"), begun) == 65
    assert said(out) == (65, "broken")
    with pytest.raises(KeyboardInterrupt):  # as a kill: nothing is said after it
        fails(monkeypatch, out, cast(Any, KeyboardInterrupt()), begun)
    assert said(out) == (BEGUN_CODE, BEGUN)
