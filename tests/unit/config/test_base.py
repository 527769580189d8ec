"""Recipes: what people may write, and what they are told when it is wrong."""

from pathlib import Path

import pytest
import yaml

from h3scale.config.base import find, load_recipe, load_yaml
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError, MissingInputError

RECIPE = """
model: models/base
out: out
data: {records: [a.jsonl], rows_per_batch: 8}
steps: 10
rows_per_micro_batch: 4
trainable: [ffn]
optimizer: {learning_rate: 1e-3}
deepspeed: ds_configs/cpu_dense.json
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def findings(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TrainRecipe, path, list(overrides))
    return caught.value.findings


def test_a_number_without_a_dot_is_a_number(recipe: Path) -> None:
    assert load_recipe(TrainRecipe, recipe).optimizer.learning_rate == 1e-3
    assert load_recipe(TrainRecipe, recipe, ["optimizer.learning_rate=5e-4"]).optimizer.learning_rate == 5e-4


def test_overrides_reach_into_sections_and_win(recipe: Path) -> None:
    loaded = load_recipe(TrainRecipe, recipe, ["router.loss_weight=2", "data.records=[b.jsonl,c.jsonl]"])
    assert loaded.router.loss_weight == 2
    assert [source.path for source in loaded.data.records] == ["b.jsonl", "c.jsonl"]
    assert loaded.data.rows_per_batch == 8


def test_an_unknown_key_is_refused_with_the_nearest_known_one(recipe: Path) -> None:
    (finding,) = findings(recipe, "data.sequence_lenght=128")
    assert finding.endswith("data.sequence_lenght: unknown key (did you mean 'sequence_length'?)")


def test_all_findings_come_at_once(recipe: Path) -> None:
    found = findings(recipe, "steps=0", "optimizer.learning_rate=-1", "nonsense_key=1")
    assert len(found) == 3
    assert all(str(recipe) in finding for finding in found)


def test_a_micro_batch_that_does_not_divide_says_what_works(recipe: Path) -> None:
    (finding,) = findings(recipe, "rows_per_micro_batch=3")
    assert "3 does not divide data.rows_per_batch = 8 (works: 1, 2, 4, 8)" in finding


def test_extends_gives_what_is_not_set(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\ndata: {rows_per_batch: 16}\n")
    loaded = load_recipe(TrainRecipe, child)
    assert loaded.data.rows_per_batch == 16
    assert [source.path for source in loaded.data.records] == ["a.jsonl"]


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:2: .*'steps' is written twice"):
        load_yaml(path)


def test_a_recipe_that_extends_itself_and_a_list_as_a_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("extends: loop.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_yaml(path)
    path.write_text("? [1, 2]\n: 3\n")
    with pytest.raises(ConfigError, match="a key must be a word"):
        load_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.yaml: no such file"):
        find(tmp_path / "nowhere.yaml")


def test_shipped_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert yaml.safe_load(find("recipes/demo/base.yaml").read_text())["init"] == "random"
