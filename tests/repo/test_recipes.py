"""Recipes for real models, without running them: they fit their DeepSpeed file, their ranks, their model and their data."""

import re
from functools import cache
from pathlib import Path

import pytest

from h3scale.config.base import find, load_recipe, load_yaml
from h3scale.config.deepspeed import complete, read_deepspeed
from h3scale.config.fuse import FuseRecipe
from h3scale.config.recipe import TrainRecipe
from h3scale.data.adapters import ADAPTERS
from h3scale.data.parts import hub_name, parts_of
from h3scale.model.families import FAMILIES
from h3scale.topology import best_ep_size

ROOT = Path(__file__).parents[2]
FOLDERS = ("h3fusion_llama2_7b", "llama31_8b", "mistral_7b", "qwen3_8b")
RECIPES = [path for folder in FOLDERS for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))]
RUNS = [path for path in RECIPES if path.stem not in ("align", "fuse")]  # align.yaml is what align_*.yaml share
RANKS_PER_NODE = 8
GPU_BYTES = 80e9
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def fuse_of(path: Path) -> FuseRecipe:
    return load_recipe(FuseRecipe, path.parent / "fuse.yaml")


def nodes_of(path: Path) -> int:
    found = re.search(r"_(\d+)_nodes$", path.stem)
    return int(found[1]) if found else 1


def is_fused(recipe: TrainRecipe) -> bool:
    return "experts" in recipe.trainable


@cache
def tables() -> dict[str, list[list[str]]]:
    """The README's tables by the first word of their head: cells without marks."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", README, flags=re.MULTILINE):
        lines = [
            [cell.strip().replace("`", "").replace("*", "") for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found[lines[0][0]] = lines[2:]
    return found


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_recipe_fits_its_deepspeed_file_and_its_ranks(path: Path) -> None:
    recipe = load_recipe(TrainRecipe, path)
    assert recipe.ranks == RANKS_PER_NODE
    moe = None
    if is_fused(recipe):
        moe = (FAMILIES[str(recipe.family)].autoep_preset, fuse_of(path).num_experts)
    world_size = nodes_of(path) * RANKS_PER_NODE
    config = complete(read_deepspeed(recipe.deepspeed), recipe, name_of(path), world_size, moe, RANKS_PER_NODE)
    assert config["gradient_accumulation_steps"] == 1
    assert bool(config.get("expert_parallel")) == is_fused(recipe)
    assert config["bf16"]["enabled"]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_what_one_recipe_leaves_the_next_one_takes(path: Path) -> None:
    recipe, fuse = load_recipe(TrainRecipe, path), fuse_of(path)
    assert recipe.family == fuse.family
    if is_fused(recipe):
        assert recipe.model == fuse.out
    else:
        assert recipe.model == fuse.base
        assert recipe.alignment in path.stem
        assert fuse.models[str(recipe.alignment)].replace("models/", "checkpoints/") == recipe.out
    assert {fuse.base.split("/")[1], *fuse.models} <= set(re.findall(r"[\w.-]+", README))


def test_no_two_recipes_write_to_one_place() -> None:
    places = [load_recipe(TrainRecipe, path).out for path in RUNS] + [fuse_of(path).out for path in RUNS if path.stem == "train"]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_public_set_is_one_whose_fields_and_split_are_known(path: Path) -> None:
    recipe = load_recipe(TrainRecipe, path)
    for source in recipe.data.records:
        if source.path.startswith("hub:"):
            adapter = ADAPTERS[hub_name(source.path)[0]]
            assert parts_of([source])[0].split in adapter.splits
            assert source.path in {f"hub:{row[0]}" for row in tables()["public set"]}


def sizes_of(path: Path) -> dict[str, float]:
    """Millions of tokens of each alignment, by the README's table of public sets; the column is the template's."""
    column = 3 if path.parent.name.startswith("h3fusion") else 2
    own = {f"hub:{row[0]}": (row[1], row[column]) for row in tables()["public set"]}
    found: dict[str, float] = {}
    for source in load_recipe(TrainRecipe, path).data.records:
        alignment, tokens = own[source.path]
        assert float(tokens) > 0
        found[alignment] = found.get(alignment, 0) + float(tokens)
    return found


@pytest.mark.parametrize("path", [path for path in RUNS if nodes_of(path) == 1], ids=name_of)
def test_the_epochs_that_the_readme_tells_are_those_of_the_steps(path: Path) -> None:
    recipe = load_recipe(TrainRecipe, path)
    sizes = sizes_of(path)
    weights = recipe.data.weights or dict.fromkeys(sizes, 1.0)
    millions = recipe.steps * recipe.data.rows_per_batch * recipe.data.sequence_length / 1e6
    epochs = {name: millions * weights[name] / sum(weights.values()) / size for name, size in sizes.items()}
    family = path.parent.name if path.parent.name.startswith("h3fusion") else "others"
    (row,) = [row for row in tables()["recipe"] if row[0] == f"{family}: {path.stem}"]
    assert millions == pytest.approx(float(row[1].split()[0]), rel=0.02)
    told = {text.split()[0]: float(text.split()[1]) for text in row[2].split(",")}
    assert told == pytest.approx(epochs, rel=0.05, abs=0.01)


@pytest.mark.parametrize("path", [path for path in RUNS if is_fused(load_recipe(TrainRecipe, path))], ids=name_of)
def test_a_gpu_holds_its_part_of_what_is_trained(path: Path) -> None:
    (row,) = [row for row in tables()["folder"] if row[0] == path.parent.name]
    shapes = dict(zip(("layers", "hidden", "ffn"), (int(text) for text in row[2].split(" / ")), strict=True))
    trained = fuse_of(path).num_experts * 3 * shapes["layers"] * shapes["hidden"] * shapes["ffn"]
    share = 16 * trained / (nodes_of(path) * RANKS_PER_NODE)
    assert share < 0.6 * GPU_BYTES
    if nodes_of(path) == 1:
        assert share / 1e9 == pytest.approx(float(row[3].split()[0]), abs=0.6)


def test_an_extended_recipe_says_all_that_its_model_changes() -> None:
    for path in RECIPES:
        written = load_yaml(find(path))
        assert path.parent.name in written["out"], name_of(path)
        own = written.get("data", {}).get("prepared", path.parent.name)
        assert path.parent.name in own, name_of(path)


def test_best_keeps_the_experts_of_a_node_inside_it() -> None:
    for path in RUNS:
        recipe = load_recipe(TrainRecipe, path)
        if is_fused(recipe):
            best = best_ep_size(fuse_of(path).num_experts, RANKS_PER_NODE)
            assert recipe.ep_size in ("best", best)
