"""Recipes for real models, without running them: they fit their DeepSpeed file, their ranks, their model and their data."""

import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sizes:
    """A base's sizes, by the README, and the experts that its fuse recipe makes of it."""

    layers: int
    hidden: int
    ffn: int
    vocabulary: int
    experts: int

    @property
    def ffns(self) -> int:
        """Parameters of one expert, or of a dense model's FFNs, in all layers."""
        return 3 * self.layers * self.hidden * self.ffn


def row_of(path: Path) -> list[str]:
    (row,) = [row for row in tables()["folder"] if row[0] == path.parent.name]
    return row


def sizes_of_model(path: Path) -> Sizes:
    return Sizes(*(int(text) for text in row_of(path)[2].split(" / ")), fuse_of(path).num_experts)


def state_bytes(path: Path) -> float:
    """A GPU's part of what is trained: bf16 weight, fp32 gradient and master, two moments, and a 16-bit start held by the drift."""
    recipe, sizes = load_recipe(TrainRecipe, path), sizes_of_model(path)
    drift = 2 * bool(recipe.drift.gamma or recipe.drift.gammas)
    trained = (2 + 4 + 4 + 8 + drift) * sizes.experts * sizes.ffns if is_fused(recipe) else 18 * sizes.ffns * bool(recipe.trainable)
    return trained / (nodes_of(path) * RANKS_PER_NODE)


def passing_bytes(path: Path) -> float:
    """What a GPU holds at the peak of a step beside that: frozen and gathered weights, logits, activations, buckets."""
    recipe, sizes, top_k = load_recipe(TrainRecipe, path), sizes_of_model(path), fuse_of(path).top_k
    zero = read_deepspeed(recipe.deepspeed)["zero_optimization"]
    tokens, hidden = recipe.rows_per_micro_batch * recipe.data.sequence_length, sizes.hidden
    frozen = 2 * (2 * sizes.vocabulary * hidden + 4 * hidden**2 * sizes.layers) / (nodes_of(path) * RANKS_PER_NODE)
    in_bf16, in_fp32 = 2 * 2 * tokens * sizes.vocabulary, 2 * 4 * min(tokens, 1024) * sizes.vocabulary
    ep_size = best_ep_size(sizes.experts, RANKS_PER_NODE) if recipe.ep_size == "best" else recipe.ep_size
    of_a_layer = 2 * sizes.ffns / sizes.layers * (sizes.experts / ep_size if is_fused(recipe) else 1)
    buckets = 2 * (zero["reduce_bucket_size"] + zero["stage3_prefetch_bucket_size"]) + 4 * zero["sub_group_size"]
    layer = 2 * tokens * (8 * hidden + (top_k if is_fused(recipe) else 1) * (2 * hidden + 4 * sizes.ffn))
    kept = 2 * tokens * hidden * sizes.layers + layer if recipe.activation_checkpointing else layer * sizes.layers
    return frozen + in_bf16 + in_fp32 + 2 * zero["stage3_max_live_parameters"] + of_a_layer + buckets + kept


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_gpu_holds_its_part(path: Path) -> None:
    total = state_bytes(path) + passing_bytes(path)
    assert total < 0.9 * GPU_BYTES
    if path.stem == "train":
        assert float(row_of(path)[3].removesuffix(" GB")) == pytest.approx(state_bytes(path) / 1e9, abs=0.06)
        assert float(row_of(path)[4].removesuffix(" GB")) == pytest.approx(total / 1e9, abs=0.6)


def test_the_disk_and_the_host_memory_that_the_readme_tells_are_those_of_the_largest_recipe() -> None:
    sizes = sizes_of_model(ROOT / "recipes/llama31_8b/train.yaml")
    trained = sizes.experts * sizes.ffns
    key_and_value = 2 * 1024  # of 8 heads of 128
    frozen = 2 * sizes.vocabulary * sizes.hidden + sizes.layers * sizes.hidden * (2 * sizes.hidden + key_and_value)
    assert f"{(12 * trained + 2 * frozen) / 1e9:.0f} GB for\n  Llama-3.1's four experts" in README
    assert f"{(12 * sizes.ffns + 2 * frozen) / 1e9:.0f} GB for one aligned model" in README
    assert f"A consolidated model is fp32: {4 * (trained + frozen) / 1e9:.0f} GB" in README
    assert f"some {24 * trained / 1e10:.0f}0 GB for Llama-3.1's four experts" in README


FUSED = {load_recipe(FuseRecipe, path).out for path in sorted((ROOT / "recipes").rglob("fuse*.yaml"))}
ALL_RUNS = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "steps" in load_yaml(path)]


@pytest.mark.parametrize("path", ALL_RUNS, ids=name_of)
def test_no_recipe_freezes_experts_that_could_not_be_saved(path: Path) -> None:
    recipe = load_recipe(TrainRecipe, path)
    stage = read_deepspeed(recipe.deepspeed)["zero_optimization"]["stage"]
    if recipe.model in FUSED and stage == 3:  # DeepSpeed writes no frozen experts; a learning rate of 0 does
        assert {"experts", "ffn", "all"} & set(recipe.trainable)


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
