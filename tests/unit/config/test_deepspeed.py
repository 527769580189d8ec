"""DeepSpeed files: one master for every value, and no typo in silence."""

import json
from pathlib import Path

import pytest

from h3scale.config.base import find, load_recipe
from h3scale.config.deepspeed import complete, read_deepspeed
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError


def write(folder: Path, values: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(values))
    return str(path)


def recipe(*overrides: str) -> TrainRecipe:
    return load_recipe(TrainRecipe, "recipes/demo/train.yaml", list(overrides))


@pytest.mark.parametrize("path", sorted(p.name for p in find("ds_configs/cpu_debug.json").parent.glob("*.json")))
def test_shipped_files_pass(path: str) -> None:
    assert read_deepspeed(f"ds_configs/{path}")["zero_optimization"]["stage"] in (0, 1, 2, 3)


def test_what_the_recipe_owns_is_refused_with_the_recipes_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gradient_clipping: the recipe owns this .set optimizer\.clip_norm there"):
        read_deepspeed(write(tmp_path, {"gradient_clipping": 1.0}))


def test_typos_that_deepspeed_would_ignore_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(write(tmp_path, {"zero_optimisation": {}, "expert_parallel": {"use_grouped_mn": True, "autoep_size": 2}}))
    text = str(caught.value)
    assert "did you mean 'zero_optimization'?" in text
    assert "did you mean 'use_grouped_mm'?" in text
    assert "expert_parallel.autoep_size: h3scale sets this (ep_size)" in text


def test_auto_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.reduce_bucket_size: 'auto'"):
        read_deepspeed(write(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ([1], "expected a JSON object, found list"),
        ({"zero_optimization": 3}, "zero_optimization: expected a JSON object"),
        ({"zero_optimization": {"stage": 9}}, r"zero_optimization\.stage: 9 \(works: 0, 1, 2, 3\)"),
        ({"zero_optimization": {"offload_optimzer": {}}}, "did you mean 'offload_optimizer'"),
    ],
)
def test_what_is_no_deepspeed_file_is_refused(tmp_path: Path, values: object, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        read_deepspeed(write(tmp_path, values))


def test_the_batch_is_the_same_for_any_number_of_ranks() -> None:
    for world_size in (1, 2):
        config = complete({}, recipe("ep_size=1"), "r.yaml", world_size, ("mixtral", 4))
        micro, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        assert micro * steps * world_size == recipe().data.rows_per_batch


def test_ep_size_must_divide_experts_and_ranks() -> None:
    with pytest.raises(ConfigError, match=r"ep_size: 3 must divide num_experts = 4 and world_size = 2 \(works: 1, 2\)"):
        complete({}, recipe("ep_size=3"), "r.yaml", 2, ("mixtral", 4))


def test_a_dense_model_has_no_expert_parallelism() -> None:
    with pytest.raises(ConfigError, match="the model is dense and has no experts"):
        complete({}, recipe("ep_size=2"), "r.yaml", 2, None)
    assert "expert_parallel" not in complete({"expert_parallel": {}}, recipe("ep_size=1"), "r.yaml", 2, None)
