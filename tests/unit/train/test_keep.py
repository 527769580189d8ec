"""What a run leaves gets its name, and nothing that is there is deleted for it."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError, OutputError, StorageError
from h3scale.exit_status import read_exit_status
from h3scale.train import keep, naming
from h3scale.train.keep import Keeper

STEPS = 4


class Written(Keeper):
    """A Keeper whose models are files with the step's number."""

    def _write(self, step: int, facts: dict[str, Any]) -> None:
        self._put(self._folder(step), "config.json", str(step))
        self.models.add(step)
        if self.run.zero_stage == 3:
            self._write_state(step, facts)

    def _write_state(self, step: int, facts: dict[str, Any], background: bool = False) -> None:
        kept = {"best_step": self.best_step, "best_nll": None}
        self.state_folder(step).mkdir(exist_ok=True)
        write_manifest(self.state_folder(step), {"step": step, **facts, "kept": kept})
        self.states.add(step)
        self._tidy()

    def _put(self, folder: Path, name: str, text: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def keeper(folder: Path, force: bool = False, zero_stage: int = 3, keep_best: bool = False, keep: int = 2) -> Written:
    """Of a run of STEPS steps that has begun."""
    run_folder, out = folder / ".run-x", folder / "x"
    run_folder.mkdir()
    (run_folder / "run.json").write_text("{}")
    recipe: Any = SimpleNamespace(
        steps=STEPS, evaluation=SimpleNamespace(keep_best=keep_best), save=SimpleNamespace(every=1, keep=keep)
    )
    run: Any = SimpleNamespace(rank=0, zero_stage=zero_stage)
    loader: Any = None
    return Written(recipe, run, loader, run_folder, out, force, {}, lambda: ({}, {}))


def there(kept: Keeper) -> list[str]:
    return sorted(path.name for path in kept.run_folder.iterdir() if path.is_dir())


def test_the_newest_checkpoints_stay_and_the_best_model_beside_them(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep_best=True)
    kept.take(1, 1.5)
    for step in (1, 2, 3, 4):
        kept.save(step, must=True)
    assert there(kept) == ["step-000001", "step-000003", "step-000004"]
    kept.take(5, 1.4)  # the older checkpoint would still have step 1 as its best
    assert there(kept) == ["step-000001", "step-000004", "step-000005"]
    kept.save(6, must=True)
    assert there(kept) == ["step-000005", "step-000006"]


def test_a_model_folder_that_was_the_best_stays_as_long_as_a_checkpoint_that_says_so(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path, zero_stage=2, keep_best=True)
    kept.take(1, 1.5)
    kept.save(1, must=True)
    kept.take(2, 1.4)
    assert there(kept) == ["resume-000001", "step-000001", "step-000002"]
    kept.save(2, must=True)
    kept.save(3, must=True)
    assert there(kept) == ["resume-000002", "resume-000003", "step-000002"]


def test_a_run_that_goes_on_knows_its_best_and_writes_nothing_twice(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep_best=True)
    kept.take(2, 1.5)
    again = Written(kept.recipe, kept.run, kept.loader, kept.run_folder, kept.out, False, {}, lambda: ({}, {}))
    again.resume({"best_step": 2, "best_nll": 1.5})
    again.take(3, 1.6)
    assert again.best_step == 2
    before = (kept.run_folder / "step-000002" / "manifest.json").stat().st_mtime_ns
    again.save(2, must=True)
    assert (kept.run_folder / "step-000002" / "manifest.json").stat().st_mtime_ns == before


def test_a_run_whose_keep_best_was_turned_off_leaves_its_last_step(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(2, must=True)
    kept.resume({"best_step": 2, "best_nll": 1.5})
    assert kept.finish() == tmp_path / "x" / f"step-{STEPS:06d}"
    assert [path.name for path in (tmp_path / "x").glob("step-*")] == [f"step-{STEPS:06d}"]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_run_that_goes_on_knows_all_that_is_there(one_rank: None, tmp_path: Path, zero_stage: int) -> None:
    kept = keeper(tmp_path, zero_stage=zero_stage)
    for step in (1, 2):
        kept.save(step, must=True)
    kept._put(kept.run_folder / "step-000001.copy", "manifest.json", "{}")  # somebody's own
    again = Written(kept.recipe, kept.run, kept.loader, kept.run_folder, kept.out, False, {}, lambda: ({}, {}))
    again.resume({"best_step": 0, "best_nll": None})
    assert again.states == {1, 2}  # a run that diverges writes step 1 where it is not there, and renames onto it where it is
    assert again.models == ({1, 2} if zero_stage == 3 else set())
    assert (kept.run_folder / "step-000001.copy").is_dir()


def test_a_run_has_not_ended_before_its_folder_has_its_name(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    (tmp_path / "x").write_text("in the way")
    with pytest.raises(OutputError):
        kept.finish()
    assert read_exit_status(tmp_path / "x") is None
    (tmp_path / "x").unlink()
    kept.finish()
    status = read_exit_status(tmp_path / "x")
    assert status is not None
    assert (status["exit_code"], status["reason"]) == (0, "done")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_came_into_the_way_during_the_run_stays_and_so_does_the_model(one_rank: None, tmp_path: Path, zero_stage: int) -> None:
    kept = keeper(tmp_path, zero_stage=zero_stage)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"made by somebody else during the run; what the run leaves is in .*/\.run-x") as caught:
        kept.finish()
    assert caught.value.exit_code == 73
    assert (tmp_path / "x" / "precious.txt").read_text() == "mine"
    model = tmp_path / ".run-x" / (f"step-{STEPS:06d}" if zero_stage == 3 else ".")
    assert (model / "config.json").read_text() == str(STEPS)


@pytest.mark.parametrize("there", ["folder", "file", "link", "empty folder"])
def test_force_replaces_what_is_there_and_leaves_nothing_else(one_rank: None, tmp_path: Path, there: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious.txt").write_text("mine")
    if there == "link":
        (tmp_path / "x").symlink_to("elsewhere")
    elif there == "file":
        (tmp_path / "x").write_text("old")
    else:
        (tmp_path / "x").mkdir()
    if there == "folder":
        (tmp_path / "x" / "old.txt").write_text("old")
    assert keeper(tmp_path, force=there != "empty folder").finish() == tmp_path / "x" / f"step-{STEPS:06d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "x"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["exit_status.json", "run.json", f"step-{STEPS:06d}"]
    assert (tmp_path / "elsewhere" / "precious.txt").read_text() == "mine"


def test_what_force_would_replace_is_there_again_when_it_does_not_succeed(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old.txt").write_text("old")
    kept = keeper(tmp_path, force=True)
    rename = Path.rename

    def cannot(_one: Path, _other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def refuses(path: Path, target: Path) -> Path:
        if path == kept.run_folder:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    monkeypatch.setattr(naming, "exchange", cannot)
    with pytest.raises(OutputError, match="Permission denied"):
        kept.finish()
    assert (tmp_path / "x" / "old.txt").read_text() == "old"
    assert (kept.run_folder / f"step-{STEPS:06d}" / "config.json").exists()


def test_a_model_folder_is_the_best_model_with_the_last_one_in_it(one_rank: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path, zero_stage=0, keep_best=True)
    kept.take(2, 1.5)
    kept.take(STEPS, 1.6)
    assert kept.finish() == tmp_path / "x"
    assert (tmp_path / "x" / "config.json").read_text() == "2"
    assert (tmp_path / "x" / "last" / "config.json").read_text() == str(STEPS)
    assert not list((tmp_path / "x").glob("step-*"))


@pytest.mark.parametrize("best", [2, 3])
def test_a_diverged_run_says_so_in_the_manifest_of_its_last_good_step_also_where_that_is_the_best(
    one_rank: None, tmp_path: Path, best: int
) -> None:
    kept = keeper(tmp_path, keep_best=True)
    kept.take(best, 1.5)
    assert kept.finish_diverged(3) == tmp_path / "x" / "step-000003"
    manifest = read_manifest(tmp_path / "x" / "step-000003")
    facts = {"best": True, "heldout_nll": 1.5} if best == 3 else {"best": False}
    assert manifest == {"step": 3, **facts, "kept": {"best_step": best, "best_nll": None}, "ended": "diverged"}


def test_memory_that_runs_out_while_a_model_is_saved_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(keep, "write_checkpoint", full)
    recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", [])
    engine = SimpleNamespace(device=torch.device("cpu"), zero_offload_optimizer=lambda: None)
    run: Any = SimpleNamespace(rank=0, zero_stage=3, engine=engine, expert_map=None, world_size=1, ep_size=1)
    loader: Any = None
    with pytest.raises(ConfigError, match=r"^saving: out of memory on rank 0 "):
        Keeper(recipe, run, loader, tmp_path / ".run-x", tmp_path / "x", False, {}, lambda: ({}, {})).finish()


class Slow:
    """Files of a checkpoint that are being written until somebody waits for them."""

    def __init__(self, said: list[str], step: int, fails: bool):
        self.said, self.step, self.fails, self.writing = said, step, fails, True

    def is_writing(self) -> bool:
        return self.writing

    def finish(self) -> None:
        self.said.append(f"{self.step} is written")
        self.writing = False
        if self.fails:
            raise StorageError("the disk is full")


def in_background(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_error: str = "stop", room: bool = True, fails: tuple[int, ...] = ()
) -> tuple[Keeper, list[str]]:
    """A Keeper of one rank, and what it does."""
    said: list[str] = []

    def write(*arguments: Any) -> Slow:
        partial, step, background = arguments[3], arguments[4], arguments[7]
        said.append(f"{step} is begun{' in the background' if background else ''}")
        partial.mkdir()
        write_manifest(partial, {"step": step, "kept": {"best_step": 0, "best_nll": None}})
        return Slow(said, step, step in fails)

    monkeypatch.setattr(keep, "write_checkpoint", write)
    monkeypatch.setattr(keep, "has_room_in_memory", lambda _run: room)
    plain = keeper(folder)
    plain.recipe.save.background, plain.recipe.save.on_error = True, on_error
    return Keeper(plain.recipe, plain.run, plain.loader, plain.run_folder, plain.out, False, {}, lambda: ({}, {})), said


def test_a_save_in_the_background_is_waited_for_by_the_next_one_and_by_the_end(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, said = in_background(tmp_path, monkeypatch)
    kept.save(1, must=False)
    assert kept.is_writing()
    assert not kept.states
    kept.save(2, must=False)
    assert said == ["1 is begun in the background", "1 is written", "2 is begun in the background"]
    kept.save(3, must=True)
    assert said[3:] == ["2 is written", "3 is begun", "3 is written"]
    assert kept.states == {1, 2, 3}
    kept.finish()
    assert said[6:] == [f"{STEPS} is begun", f"{STEPS} is written"]


def test_a_save_is_not_in_the_background_where_the_memory_has_no_room(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, said = in_background(tmp_path, monkeypatch, room=False)
    kept.save(1, must=False)
    assert said == ["1 is begun", "1 is written"]


def test_a_disk_that_refuses_in_the_background_ends_the_run_or_not_by_recipe(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for on_error in ("stop", "go_on"):
        (tmp_path / on_error).mkdir()
        kept, said = in_background(tmp_path / on_error, monkeypatch, on_error, fails=(2,))
        kept.save(1, must=False)
        kept.save(2, must=False)
        if on_error == "stop":
            with pytest.raises(StorageError, match="the disk is full"):
                kept.settle()
        else:
            kept.settle()
            kept.save(3, must=True)
            assert said[-1] == "3 is written"
        assert there(kept)[0] == "step-000001"
        assert "step-000002" not in there(kept)
        assert not kept.is_writing()
