"""`model=tiny`: what it replaces, and what it leaves to the recipe and to the command line."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from h3scale.config.base import load_recipe
from h3scale.config.fuse import FuseRecipe
from h3scale.config.recipe import DenseFamily, TrainRecipe
from h3scale.config.tiny import PLACE, TINY, toy_lines
from h3scale.errors import ConfigError

TRAIN = {
    "model": "models/fused_init",
    "family": "qwen3",
    "out": "checkpoints/fused",
    "data": {"records": ["mine.jsonl"], "hygiene": {"heldout": ["eval.jsonl"], "heldout_similarity": 0.9}, "rows_per_batch": 64},
    "steps": 1000,
    "rows_per_micro_batch": 8,
    "ranks": 8,
    "trainable": ["experts", "router"],
    "optimizer": {"learning_rate": 1e-5},
    "deepspeed": "ds_configs/zero3_ep.json",
}
FUSE = {
    "base": "models/base",
    "family": "llama",
    "models": {"kind": "models/kind", "calm": "models/calm"},
    "out": "models/fused",
    "router": {"records": ["mine.jsonl"], "ridge": 0.5},
}


def written(folder: Path, recipe: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_the_command_line_goes_over_the_toy_sizes_in_any_order(tmp_path: Path) -> None:
    path = written(tmp_path, TRAIN)
    for words in (["steps=7", TINY, "data.rows_per_batch=6"], [TINY, "data.rows_per_batch=6", "steps=7"]):
        recipe = load_recipe(TrainRecipe, path, words)
        assert (recipe.steps, recipe.data.rows_per_batch) == (7, 6)
        assert recipe.rows_per_micro_batch < TRAIN["rows_per_micro_batch"]


def test_what_no_size_is_stays_as_the_recipe_says(tmp_path: Path) -> None:
    recipe = load_recipe(TrainRecipe, written(tmp_path, TRAIN), [TINY])
    assert (recipe.deepspeed, recipe.trainable, recipe.data.hygiene.heldout_similarity) == (
        TRAIN["deepspeed"],
        TRAIN["trainable"],
        0.9,
    )
    assert recipe.data.hygiene.heldout == []
    assert all(Path(path).is_file() for path in [source.path for source in recipe.data.records])


def test_all_that_is_read_and_written_lies_in_one_place(tmp_path: Path) -> None:
    train = load_recipe(TrainRecipe, written(tmp_path, TRAIN), [TINY])
    fuse = load_recipe(FuseRecipe, written(tmp_path, FUSE), [TINY])
    assert train.data.prepared is not None
    for path in (str(train.model), train.out, train.data.prepared, fuse.base, fuse.out, *fuse.models.values()):
        assert Path(path).parent == PLACE
    assert list(fuse.models) == ["kind", "calm"]
    assert fuse.router.ridge == 0.5


def test_every_replaced_key_is_told_with_the_value_that_runs(tmp_path: Path) -> None:
    recipe = load_recipe(TrainRecipe, written(tmp_path, TRAIN), [TINY, "steps=7"])
    lines = toy_lines(recipe.model_dump())
    assert "tiny: steps: 7" in lines
    assert "tiny: data.hygiene.heldout: []" in lines
    assert len([line for line in lines if line.startswith("tiny: model: tiny/qwen3-")]) == 1


@pytest.mark.parametrize("family", [None, "gpt2"])
def test_a_recipe_without_a_known_family_says_which_there_are(tmp_path: Path, family: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TrainRecipe, written(tmp_path, TRAIN | {"family": family}), [TINY])
    (finding,) = caught.value.findings
    assert finding.endswith(f"(works: {', '.join(get_args(DenseFamily))})")
