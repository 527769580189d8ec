"""Whether a run is still the one that was saved, and what is cut off its files when it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.train.resume import changes, fingerprint, identity_of, trim
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
    trim(tmp_path / "missing.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
