"""What is staged is what it was when it was staged, whatever happens to it meanwhile; a disk that refuses is told to who waits."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from h3scale.errors import StorageError
from h3scale.train import own_files
from h3scale.train.own_files import OwnFiles


def engine() -> Any:
    class Saver:
        def save(self, state_dict: Any, path: str) -> None:
            torch.save(state_dict, path)

    return SimpleNamespace(checkpoint_engine=Saver(), _copy_recovery_script=None)


@pytest.mark.parametrize("staged", [False, True])
def test_what_is_written_is_what_there_was_when_it_was_saved(one_rank: None, tmp_path: Path, staged: bool) -> None:
    values, files, deepspeed = torch.arange(5000.0), OwnFiles(tmp_path, staged), engine()
    with files.of_deepspeed(deepspeed):
        deepspeed.checkpoint_engine.save(state_dict={"values": values, "step": 3}, path=str(tmp_path / "states.pt"))
    files.write(tmp_path / "own.txt", lambda path: path.write_text("own"))
    assert (tmp_path / "states.pt").exists() == (not staged)
    values.zero_()  # the next step
    if staged:
        files.start()
    entries = files.agreed()
    saved = torch.load(tmp_path / "states.pt")
    assert saved["step"] == 3
    assert torch.equal(saved["values"], torch.arange(5000.0))
    for name in ("states.pt", "own.txt"):
        written = (tmp_path / name).read_bytes()
        assert entries[name] == {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    assert entries.keys() == {"states.pt", "own.txt"}


def staged_files(folder: Path) -> OwnFiles:
    files, deepspeed = OwnFiles(folder, staged=True), engine()
    with files.of_deepspeed(deepspeed):
        deepspeed.checkpoint_engine.save({}, str(folder / "states.pt"))
    return files


def test_who_asks_for_the_result_waits_until_all_is_written(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, held, plain = staged_files(tmp_path), threading.Event(), own_files.write_all

    def slow(*arguments: Any) -> None:
        held.wait(30)
        plain(*arguments)

    monkeypatch.setattr(own_files, "write_all", slow)
    files.start()
    assert files.is_writing()
    held.set()
    assert files.agreed().keys() == {"states.pt"}
    assert not files.is_writing()


def test_a_disk_that_refuses_is_told_to_who_asks_for_the_result(one_rank: None, tmp_path: Path) -> None:
    files = staged_files(tmp_path)
    (tmp_path / "states.pt").mkdir()  # in the way
    files.start()
    with pytest.raises(StorageError, match=r"states.pt: cannot be written: .* \(rank 0\)"):
        files.agreed()


def test_an_error_of_ours_in_the_background_is_not_taken_for_the_disks(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise ZeroDivisionError

    files = staged_files(tmp_path)
    monkeypatch.setattr(own_files, "write_all", wrong)
    files.start()
    with pytest.raises(ZeroDivisionError):
        files.agreed()
