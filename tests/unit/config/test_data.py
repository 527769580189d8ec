"""The data section of a recipe: what is written is what is meant, and what cannot be is said in one line."""

from pathlib import Path

import pytest

from h3scale.config.base import load_recipe
from h3scale.config.data import Source
from h3scale.config.recipe import TokenizerRecipe, TrainRecipe
from h3scale.errors import ConfigError

RECIPE = """
model: m
out: o
steps: 3
trainable: [all]
optimizer: {learning_rate: 0.1}
deepspeed: x.json
data:
  records: [a.jsonl]
  sequence_length: 99
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_text_is_a_path_and_more_is_a_source(recipe: Path) -> None:
    override = "data.records=[b.jsonl, {path: c.parquet, adapter: alpaca, alignment: helpful}]"
    b, c = load_recipe(TrainRecipe, recipe, [override]).data.records
    assert b == Source(path="b.jsonl")
    assert c == Source(path="c.parquet", adapter="alpaca", alignment="helpful")
    assert "split" not in b.model_fields_set  # an adapter's own split is taken then


def test_data_alone_is_short_for_its_records_and_leaves_the_rest(recipe: Path, tmp_path: Path) -> None:
    data = load_recipe(TrainRecipe, recipe, ["data=folder"]).data
    assert [source.path for source in data.records] == ["folder"]
    assert data.sequence_length == 99
    other = tmp_path / "tokenizer.yaml"
    other.write_text("vocab_size: 9\nout: o\nrecords: [a]\n")
    assert load_recipe(TokenizerRecipe, other).records == [Source(path="a")]


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("data.records=[]", "data.records: []: List should have at least 1 item after validation, not 0"),
        (
            "data.records=[3]",
            "data.records.0: 3: expected a section with keys of its own (works: adapter, alignment, part, path, split)",
        ),
        ("data.records=[{path: x, adaptor: y}]", "data.records.0.adaptor: unknown key (did you mean 'adapter'?)"),
        ("data.weights={helpful: -1}", "data.weights.helpful: -1: Input should be greater than or equal to 0"),
        ("data.weights={helpful: .nan}", "data.weights.helpful: nan: Input should be a finite number"),
        ("data.weights={a: 0, b: 0}", "data: weights: {'a': 0.0, 'b': 0.0} sum to 0 (works: at least one above 0)"),
        ("data.temperature=0", "data.temperature: 0: Input should be greater than 0"),
        ("data.schedule=[{from_step: 3, weights: {a: 1}}]", "data: schedule: from_step [3] (works: 0 first, then growing)"),
        (
            "data.schedule=[{from_step: 0, weights: {a: 1}}, {from_step: 0, weights: {a: 2}}]",
            "data: schedule: from_step [0, 0] (works: 0 first, then growing)",
        ),
        ("data.max_epochs=0", "data.max_epochs: 0: Input should be greater than 0"),
        ("data.max_epochs={honest: -1}", "data.max_epochs.honest: -1: Input should be greater than 0"),
        ("data.max_epochs=many", "data.max_epochs: 'many': Input should be a valid number"),
        ("data.hygiene.near_duplicates=1.5", "data.hygiene.near_duplicates: 1.5: Input should be less than or equal to 1"),
        ("data.hygiene.heldot=[x]", "data.hygiene.heldot: unknown key (did you mean 'heldout'?)"),
        ("data.packing=loose", "data.packing: 'loose': Input should be 'mixed' or 'separate'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(recipe: Path, override: str, finding: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TrainRecipe, recipe, [override])
    assert caught.value.findings == [f"{recipe}: {finding}"]


def test_two_ways_to_say_the_shares_exclude_each_other(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="weights and temperature exclude each other"):
        load_recipe(TrainRecipe, recipe, ["data.weights={a: 1}", "data.temperature=2"])
