"""Every recipe for a real model runs at toy size, with its own DeepSpeed file, losses, groups and LoRA."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.cli.main import app
from h3scale.config.base import load_recipe
from h3scale.config.fuse import FuseRecipe
from h3scale.config.recipe import TrainRecipe
from h3scale.config.tiny import PLACE
from h3scale.launch.local import rank_command, run_ranks
from h3scale.model.experts import ExpertMap
from h3scale.model.families import FAMILIES
from tests.repo.test_recipes import FOLDERS, ROOT, RUNS, is_fused, name_of

pytestmark = pytest.mark.distributed

STEPS = 2
# One of each kind at every test; the others differ from these in names, and in numbers that the toy size replaces anyway.
OF_EACH_KIND = [
    "h3fusion_llama2_7b/train.yaml",
    "llama31_8b/align_helpful.yaml",
    "mistral_7b/train_4_nodes.yaml",
    "qwen3_8b/train.yaml",
]
TRAINED = [name if (name := name_of(path)) in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for path in RUNS]
REPLACED = {"model", "out", "data", "steps", "rows_per_micro_batch", "ranks"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_at_toy_size(here: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "recipes" / name
    words = [str(path), "model=tiny", f"steps={STEPS}"]
    recipe = load_recipe(TrainRecipe, path, words[1:])
    assert run_ranks(rank_command("h3scale.train", words), recipe.ranks) == 0
    said = capfd.readouterr().err
    assert f"tiny: steps: {STEPS}\n" in said
    assert "tiny: data.sequence_length: " in said
    out = Path(recipe.out)
    assert out.parts[: len(PLACE.parts)] == PLACE.parts
    (metrics,) = out.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len([line for line in lines if "lm" in line]) == STEPS
    for term, weight in (
        ("router", recipe.router.loss_weight),
        ("router_z", recipe.router.z_weight),
        ("drift", recipe.drift.gamma),
    ):
        if is_fused(recipe) and weight:
            assert term in lines[-1]
    model = ModelFolder(str(recipe.model)).config
    assert model["model_type"] == (FAMILIES[str(recipe.family)].moe_type if is_fused(recipe) else recipe.family)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_fuse_recipe_fuses_at_toy_size(here: Path, folder: str) -> None:
    path = ROOT / "recipes" / folder / "fuse.yaml"
    done = CliRunner().invoke(app, ["fuse", str(path), "model=tiny"])
    assert done.exit_code == 0, done.output
    recipe = load_recipe(FuseRecipe, path, ["model=tiny"])
    config = read_json(Path(recipe.out) / "config.json")
    assert config["model_type"] == FAMILIES[str(recipe.family)].moe_type
    expert_map = ExpertMap.from_config(config)
    assert expert_map is not None
    assert list(expert_map.alignments) == list(recipe.models)
    assert expert_map.num_experts == load_recipe(FuseRecipe, path).num_experts
    assert config["num_experts_per_tok"] == recipe.top_k


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_toy_size_changes_what_it_says_and_nothing_else(path: Path) -> None:
    real, toy = (load_recipe(TrainRecipe, path, words).model_dump() for words in ([], ["model=tiny"]))
    assert {key for key in real if real[key] != toy[key]} <= REPLACED
    assert toy["data"]["weights"] == real["data"]["weights"]
    assert toy["data"]["max_epochs"] == real["data"]["max_epochs"]
