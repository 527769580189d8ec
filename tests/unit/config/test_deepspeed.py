"""DeepSpeed files: one master for every value, and no typo in silence."""

import json
from pathlib import Path

import pytest

from h3scale.config.base import find, load_recipe
from h3scale.config.deepspeed import SECTIONS, complete, read_deepspeed
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
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization\.offload_optimizer\.devise: unknown key \(did you mean 'device'",
        ),
        ({"bf16": {"enable": True}}, r"bf16\.enable: unknown key \(did you mean 'enabled'"),
        ({"zero_optimization": {"offload_param": "cpu"}}, r"zero_optimization\.offload_param: expected a JSON object"),
        ({"bf16": True}, "bf16: expected a JSON object"),
        ({"activation_checkpointing": {"partition": True}}, r"activation_checkpointing\.partition: unknown key"),
        ({"bf16": {"enabled": "auto"}}, r"bf16\.enabled: 'auto' is no value here"),
        ({"steps_per_print": "auto"}, r"steps_per_print: 'auto' is no value here"),
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


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    assert SECTIONS["bf16"] == set(DeepSpeedBF16Config.model_fields)
    assert SECTIONS["activation_checkpointing"] == set(ACT_CHKPT_DEFAULT)
    assert SECTIONS["zero_optimization.offload_param"] == set(DeepSpeedZeroOffloadParamConfig.model_fields)
    assert SECTIONS["zero_optimization.offload_optimizer"] == set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    zero = {alias for name, field in DeepSpeedZeroConfig.model_fields.items() for alias in (name, field.alias) if alias}
    assert SECTIONS["zero_optimization"] <= zero


@pytest.mark.parametrize(("experts", "ranks", "ranks_per_node", "found"), [(8, 16, 8, 8), (4, 8, 8, 4), (6, 8, 8, 2), (7, 8, 8, 1)])
def test_the_best_ep_size_divides_the_experts_and_the_ranks_of_a_node(
    experts: int, ranks: int, ranks_per_node: int, found: int
) -> None:
    words = ("ep_size=best", "data.rows_per_batch=16", "rows_per_micro_batch=1")
    config = complete({}, recipe(*words), "r.yaml", ranks, ("mixtral", experts), ranks_per_node)
    assert config["expert_parallel"]["autoep_size"] == found
    assert "expert_parallel" not in complete({}, recipe(*words), "r.yaml", ranks, None, ranks_per_node)
