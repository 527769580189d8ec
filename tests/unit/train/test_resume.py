"""Whether a run is still the one that was saved, and what is cut off its files when it goes on."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError, DataError, OutputError
from h3scale.train.resume import changes, check_order, check_same, fingerprint, identity_of, open_run_folder, tidy_up, trim
from tests.tiny import tiny_llama

RECIPE = "recipes/demo/train.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def identity(model: Path, *words: str) -> dict[str, Any]:
    return identity_of(load_recipe(TrainRecipe, RECIPE, [f"model={model}", *words]))


def test_what_changes_neither_order_nor_losses_is_nobodys_business(model: Path) -> None:
    free = ["out=elsewhere", "ranks=4", "tracking.wandb=h3", "save.every=7", "guards.dry_run=false", "collective_timeout_s=9"]
    assert changes(identity(model), identity(model, *free)) == []


def test_what_else_changes_is_said_with_both_values(model: Path) -> None:
    words = ["optimizer.learning_rate=0.5", "data.sequence_length=128", "drift.gammas={helpful: 2}"]
    assert changes(identity(model), identity(model, *words)) == [
        "data.sequence_length: 256 -> 128",
        "drift.gammas.helpful: None -> 2.0",
        "optimizer.learning_rate: 0.001 -> 0.5",
    ]


def test_another_version_or_ds_config_is_a_change(model: Path) -> None:
    before = identity(model)
    now = json.loads(json.dumps(before))
    now["versions"]["torch"], now["ds_config"]["zero_optimization"]["stage"] = "9.9", 1
    torch = before["versions"]["torch"]
    assert changes(before, now) == ["ds_config.zero_optimization.stage: 3 -> 1", f"versions.torch: {torch} -> 9.9"]


def test_changed_source_is_a_change(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(model)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "loop.py" else b""))
    (change,) = changes(before, identity(model))
    assert re.fullmatch(r"versions\.h3scale: (\S+) \(source \w{8}\) -> \1 \(source \w{8}\)", change)


def test_another_order_of_records_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    class Loader:
        def resume(self, state: object) -> None:
            raise DataError(f"another order than {state}")

    path, loader = checkpoint(tmp_path, "step-000001"), cast(Any, Loader())
    write_manifest(path, {"data": "abc"})
    with pytest.raises(DataError, match=r"another order than abc\n.*--allow-change goes on with the new order"):
        check_order(path, loader, allow_change=False)
    check_order(path, loader, allow_change=True)


def test_a_copy_of_a_model_is_the_same_one_and_a_changed_value_another(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint(ModelFolder(copy)) == fingerprint(ModelFolder(model))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert fingerprint(ModelFolder(copy)) != fingerprint(ModelFolder(model))


def test_lines_after_the_step_are_cut_off_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "lm": 1.0}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(whole))
    trim(path, 2)
    assert path.read_text() == "".join(whole[:3])
    path.write_text("".join(whole[:2]) + '{"step": 2, "l')
    trim(path, 5)
    assert path.read_text() == "".join(whole[:2])
    path.write_text("".join(whole[:2]).rstrip())  # torn before the end of the line: the next one must not be appended to it
    trim(path, 5)
    assert path.read_text() == "".join(whole[:2])
    trim(tmp_path / "missing.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


ALONE: Any = SimpleNamespace(rank=0, world_size=1)


def checkpoint(run_folder: Path, name: str, text: str = "weights") -> Path:
    """A folder with one file, which is damaged unless its text is "weights"."""
    folder = run_folder / name
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    entry = {"size": len(text), "sha256": hashlib.sha256(b"weights").hexdigest()}
    write_manifest(folder, {"step": int(name[-6:]), "zero_stage": 0, "files": {"file": entry}})
    return folder


def test_the_same_step_may_be_damaged_twice(one_rank: None, tmp_path: Path) -> None:
    first = checkpoint(tmp_path, "step-000001")
    for _ in range(2):
        checkpoint(tmp_path, "step-000002", "WEIGHTS")
        assert open_run_folder(ALONE, tmp_path, False) == first
    assert len(list(tmp_path.glob(".damaged-step-000002*"))) == 2


def test_a_file_that_cannot_be_read_is_damage(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error", "file")

    checkpoint(tmp_path, "resume-000001")
    monkeypatch.setattr("h3scale.checkpoint.training_checkpoint.sha256", broken)
    with pytest.raises(DataError, match=r"file: Input/output error\n.*no checkpoint in it is whole"):
        open_run_folder(ALONE, tmp_path, False)


@pytest.mark.parametrize("name", [".partial-step-000001-1234abcd", ".trash-step-000001-1234abcd"])
def test_what_a_killed_run_had_not_finished_or_was_deleting_is_in_nobodys_way(one_rank: None, tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / "begun" / name, tmp_path / "saved" / name, tmp_path / "left" / name):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert open_run_folder(ALONE, tmp_path / "begun", False) is None
    tidy_up(tmp_path / "saved")
    assert [list((tmp_path / where).iterdir()) for where in ("begun", "saved")] == [[], []]
    (tmp_path / "left" / "step-000002").mkdir()
    (tmp_path / "left" / "step-000002" / "config.json").touch()
    with pytest.raises(OutputError, match="step-000002: left by a run that did not end"):
        open_run_folder(ALONE, tmp_path / "left", False)


@pytest.mark.parametrize(
    ("restart", "begun_by", "stays"), [("0", "17", False), ("1", "17", True), ("1", "16", False), ("1", None, False)]
)
def test_from_scratch_is_done_once_in_a_job(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: str, begun_by: str | None, stays: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    there = checkpoint(tmp_path, "step-000001")
    (tmp_path / "run.json").write_text(json.dumps({"begun_by_job": begun_by}))
    assert open_run_folder(ALONE, tmp_path, True) == (there if stays else None)
    assert there.exists() is stays


OTHERS = {
    "trainable=[all]": "trainable: .* -> all",
    "lora={rank: 4}": "lora: none -> rank 4 of attention",
    "optimizer.weight_decay=0.5": r"optimizer\.weight_decay: 0\.0 -> 0\.5",
}


@pytest.mark.parametrize("word", OTHERS)
def test_a_run_that_trains_other_parameters_than_before_is_refused_though_changes_are_allowed(
    model: Path, tmp_path: Path, word: str
) -> None:
    path = checkpoint(tmp_path, "step-000001")
    write_manifest(path, read_manifest(path) | {"identity": identity(model)})
    check_same(path, identity(model, "optimizer.learning_rate=0.5"), allow_change=True)
    with pytest.raises(ConfigError, match=f"^{path}: {OTHERS[word]}: cannot be gone on with, even if allowed "):
        check_same(path, identity(model, word), allow_change=True)
    write_manifest(path, read_manifest(path) | {"zero_stage": 3})
    if "decay" in word:  # there are no groups in what is read then
        check_same(path, identity(model, word), allow_change=True)


def test_a_run_that_has_taken_more_steps_than_it_is_to_take_is_refused(model: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "step-000009")
    write_manifest(path, read_manifest(path) | {"identity": identity(model, "steps=12")})
    check_same(path, identity(model, "steps=9"), allow_change=True)
    with pytest.raises(ConfigError, match="step-000009: has more than the 8 steps of the recipe"):
        check_same(path, identity(model, "steps=8"), allow_change=True)
