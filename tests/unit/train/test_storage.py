"""What a disk refuses is one line with exit code 74, whoever says it; what does not fit is said before the training."""

import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from h3scale.checkpoint.shards import write_json
from h3scale.errors import OutputError, StorageError
from h3scale.train import storage
from h3scale.train.storage import check_space, writing

VALUES = {"values": torch.zeros(100_000)}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda folder: write_json(folder / "x.json", list(range(100_000))),
    "safetensors": lambda folder: save_file(VALUES, folder / "x.safetensors"),
    "torch": lambda folder: torch.save(VALUES, folder / "x.pt"),
    "torch, old": lambda folder: torch.save(VALUES, folder / "x.pt", _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_missing_folder_is_a_storage_error(tmp_path: Path, writer: str) -> None:
    with pytest.raises(StorageError, match="cannot be written: ") as caught, writing(tmp_path / "no"):
        WRITERS[writer](tmp_path / "no")
    assert "\n" not in caught.value.findings[0]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_takes_no_more_is_a_storage_error(tmp_path: Path, writer: str) -> None:
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.getpagesize()},) * 2)"  # of a process of its own
    program = f"""
import resource, pathlib
from tests.unit.train.test_storage import *
folder = pathlib.Path({str(tmp_path)!r})
{limit}
try:
    with writing(folder):
        WRITERS[{writer!r}](folder)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()
    assert str(tmp_path) in line
    assert ": cannot be written: " in line
    assert line.endswith(" GB are free)")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gloo"), writing(tmp_path):
        raise RuntimeError("gloo: connection closed by peer")
    with pytest.raises(OutputError), writing(tmp_path):
        raise OutputError("x: exists already")


@pytest.mark.parametrize(
    ("free", "keep_best", "every", "outcome"),
    [
        (9, False, None, "error"),
        (10, False, None, ""),
        (29, True, None, "warning"),
        (30, True, None, ""),
        (69, False, 5, "warning"),  # checkpoints to go on from are larger than the model that is left
        (70, False, 5, ""),
    ],
)
def test_room_is_asked_for_before_the_first_step(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    keep_best: bool,
    every: int | None,
    outcome: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    monkeypatch.setattr(storage, "model_bytes", lambda *_: 10e9)
    monkeypatch.setattr(storage, "state_bytes", lambda _: 30e9)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 1e9))
    recipe: Any = SimpleNamespace(
        out="models/x", evaluation=SimpleNamespace(keep_best=keep_best), save=SimpleNamespace(every=every, keep=2)
    )
    run: Any = None
    if outcome == "error":
        with pytest.raises(OutputError, match=r"models/x: the model it leaves takes 10\.0 GB, and 9\.0 GB are free"):
            check_space(recipe, run, tmp_path)
    else:
        check_space(recipe, run, tmp_path)
    at_once = 70 if every else 30
    said = [f"models/x: what evaluation.keep_best and save keep takes up to {at_once}.0 GB at once, and {free}.0 GB are free"]
    assert caplog.messages == (said if outcome == "warning" else [])
