"""Trackers get every step's figures and can never stop a run; metrics.jsonl stops it when the disk does."""

import json
import logging
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import StorageError
from h3scale.train.trackers import Guarded, JsonLines, open_trackers

LINE = {"step": 3, "lm": 1.5, "lm/helpful": 1.25, "tokens": 64}


@pytest.fixture
def recipe() -> Any:
    def make(*overrides: str) -> TrainRecipe:
        return load_recipe(TrainRecipe, "recipes/demo/train.yaml", list(overrides))

    return make


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    return caplog


class Failing:
    """Raises where it is told to, and remembers what it got before."""

    def __init__(self, at: str):
        self.at = at
        self.seen: list[str] = []
        self._maybe("create")

    def _maybe(self, where: str) -> None:
        if where == self.at:
            raise OSError("no route to host\nsecond line")
        self.seen.append(where)

    def write(self, step: int, line: dict[str, Any]) -> None:
        self._maybe("write")

    def close(self) -> None:
        self._maybe("close")


@pytest.mark.parametrize("at", ["create", "write", "close"])
def test_a_tracker_that_raises_is_one_warning_and_off_from_then_on(at: str, warnings: pytest.LogCaptureFixture) -> None:
    made: list[Failing] = []

    def make() -> Failing:
        made.append(Failing(at))
        return made[0]

    tracker = Guarded("wandb", make)
    for step in range(3):
        tracker.write(step, LINE)
    tracker.close()
    tracker.write(9, LINE)
    tracker.close()
    assert [record.message for record in warnings.records] == [
        "wandb is off from now on: no route to host (training goes on; metrics.jsonl has everything)"
    ]
    assert [each.seen for each in made] == {"create": [], "write": [["create"]], "close": [["create", *["write"] * 3]]}[at]


def test_a_tracker_that_is_not_installed_is_one_warning(
    recipe: Any, tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = open_trackers(recipe("tracking={tensorboard: false, wandb: h3}"), tmp_path, "id", 0)
    for tracker in trackers:
        tracker.write(1, LINE)
    assert len(trackers) == len(warnings.records) == 1
    assert "wandb" in warnings.text


def events(folder: Path) -> list[Any]:
    """Those of the one TensorBoard file."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (folder / "tensorboard").iterdir()
    content, place, found = file.read_bytes(), 0, []
    while place < len(content):  # length, its checksum, event, its checksum
        (length,) = struct.unpack_from("<Q", content, place)
        found.append(Event.FromString(content[place + 12 : place + 12 + length]))
        place += 12 + length + 4
    return found


@pytest.mark.parametrize("first_step", [0, 2])
def test_a_run_that_goes_on_hides_what_came_after_its_step_and_not_that_step(recipe: Any, tmp_path: Path, first_step: int) -> None:
    (tracker,) = open_trackers(recipe(), tmp_path, "id", first_step)
    tracker.close()
    # TensorBoard hides events of this step and of later ones
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [first_step + 1]


def test_tensorboard_files_hold_the_figures(recipe: Any, tmp_path: Path) -> None:
    (tracker,) = open_trackers(recipe(), tmp_path, "id", 0)
    tracker.write(3, LINE)
    tracker.write(4, {**LINE, "step": 4, "lm": 0.5})
    tracker.close()
    found = {
        (e.step, value.tag): value.simple_value
        for e in events(tmp_path)
        for value in e.summary.value
        if value.HasField("simple_value")
    }
    figures = {name: value for name, value in LINE.items() if name != "step"}
    assert found == {(3, name): value for name, value in figures.items()} | {
        (4, name): value for name, value in {**figures, "lm": 0.5}.items()
    }


def test_a_disk_that_is_full_switches_tensorboard_off_at_once(
    recipe: Any, tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("h3scale.train.trackers.FLUSH_S", -1)  # every event goes to the disk
    (tracker,) = open_trackers(recipe(), tmp_path, "id", 0)
    assert isinstance(tracker, Guarded)
    tracker.write(1, LINE)
    assert not warnings.records
    with Path("/dev/full").open("wb", buffering=0) as full:
        tracker.tracker.writer._py_recordio_writer._writer = full  # type: ignore[union-attr]
        for step in range(2, 50):
            tracker.write(step, LINE)
        tracker.close()
    assert [record.message.split(" (")[0] for record in warnings.records] == [
        "tensorboard is off from now on: [Errno 28] No space left on device"
    ]


def test_wandb_and_trackio_get_project_recipe_and_figures(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args or kwargs))
            return SimpleNamespace(log=note(f"{name}.log"), finish=note(f"{name}.finish"))

        return called

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=note("wandb"), Settings=dict))
    fake = SimpleNamespace(init=note("trackio"), log=note("trackio.log"), finish=note("trackio.finish"))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    trackers = open_trackers(recipe("tracking={tensorboard: false, wandb: one, trackio: two}"), tmp_path, "the-run", 2)
    for tracker in trackers:
        tracker.write(3, LINE)
        tracker.close()
    figures = {name: value for name, value in LINE.items() if name != "step"}
    assert [name for name, _ in calls] == [
        "wandb", "trackio", "wandb.log", "wandb.finish", "trackio.log", "trackio.finish",
    ]  # fmt: skip
    assert [given["project"] for name, given in calls if name in ("wandb", "trackio")] == ["one", "two"]
    began = {name: given for name, given in calls if name in ("wandb", "trackio")}  # a run that goes on is the same one there
    assert (began["wandb"]["id"], began["wandb"]["resume"], began["trackio"]["resume"]) == ("the-run", "allow", "allow")
    assert began["trackio"]["name"].endswith("-the-run")
    assert all(given["config"]["steps"] == recipe().steps for name, given in calls if name in ("wandb", "trackio"))
    assert [given[0] for name, given in calls if name.endswith(".log")] == [figures, figures]
    assert "secret-key" not in repr(calls)


def test_metrics_jsonl_has_one_line_a_step_and_a_disk_error_is_for_the_run(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(1, LINE)
    lines.write(2, LINE)
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [LINE, LINE]
    with pytest.raises(StorageError, match=f"{tmp_path}: "):
        JsonLines(tmp_path).write(1, LINE)
