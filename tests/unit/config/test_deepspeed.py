"""DeepSpeed files: one master for every value, and no typo in silence."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from h3scale.config.base import find, load_recipe
from h3scale.config.deepspeed import complete, read_deepspeed
from h3scale.config.deepspeed_keys import OWNED, SET_HERE, UNSUPPORTED, DeepSpeedFile
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError


def write(folder: Path, values: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(values))
    return str(path)


def recipe(*overrides: str) -> TrainRecipe:
    return load_recipe(TrainRecipe, "recipes/demo/train.yaml", list(overrides))


SHIPPED = sorted(p.name for p in find("ds_configs/cpu_debug.json").parent.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_files_pass(path: str) -> None:
    assert read_deepspeed(f"ds_configs/{path}")["zero_optimization"]["stage"] in (0, 1, 2, 3)


@pytest.mark.parametrize("path", SHIPPED)
def test_a_file_that_computes_in_bf16_sums_gradients_in_fp32_and_copies_few_of_them(path: str) -> None:
    values = read_deepspeed(f"ds_configs/{path}")
    if values.get("bf16", {}).get("enabled"):
        assert values["data_types"]["grad_accum_dtype"] == "fp32"
        if values["zero_optimization"]["stage"] == 3:  # DeepSpeed's own value is 10 times as large
            assert 4 * values["zero_optimization"]["sub_group_size"] <= 0.5e9


def test_what_the_recipe_owns_is_refused_with_the_recipes_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gradient_clipping: the recipe owns this .set optimizer\.clip_norm there"):
        read_deepspeed(write(tmp_path, {"gradient_clipping": 1.0}))


def test_typos_that_deepspeed_would_ignore_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(
            write(tmp_path, {"zero_optimisation": {}, "expert_parallel": {"combine_imp": "legacy_bmm", "autoep_size": 2}})
        )
    text = str(caught.value)
    assert "did you mean 'zero_optimization'?" in text
    assert "did you mean 'combine_impl'?" in text
    assert "expert_parallel.autoep_size: the recipe owns this (set ep_size there)" in text


def test_auto_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.reduce_bucket_size: 'auto'"):
        read_deepspeed(write(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ([1], "expected a JSON object, found list"),
        ({"zero_optimization": 3}, "zero_optimization: 3: expected a section"),
        ({"zero_optimization": {"stage": 9}}, r"zero_optimization\.stage: 9: Input should be less than or equal to 3"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage: True: Input should be a valid integer"),
        ({"zero_optimization": {"stage": 2.5}}, r"zero_optimization\.stage: 2.5: Input should be a valid integer"),
        ({"zero_optimization": {"offload_optimzer": {}}}, "did you mean 'offload_optimizer'"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization\.offload_optimizer\.devise: unknown key \(did you mean 'device'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            r"zero_optimization\.offload_optimizer\.device: 'gpu': Input should be 'none' or 'cpu'",
        ),
        ({"zero_optimization": {"offload_param": "cpu"}}, r"zero_optimization\.offload_param: 'cpu': expected a section"),
        ({"zero_optimization": {"offload_param": None}}, r"zero_optimization\.offload_param: None: expected a section"),
        ({"zero_optimization": {"leaf_module": {"class": []}}}, r"leaf_module\.class: unknown key \(did you mean 'classes'"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, r"overlap_comm: 'yes': Input should be a valid boolean"),
        ({"bf16": {"enable": True}}, r"bf16\.enable: unknown key \(did you mean 'enabled'"),
        ({"bf16": True}, "bf16: True: expected a section"),
        ({"bf16": {"enabled": "auto"}}, r"bf16\.enabled: 'auto' is no value here"),
        ({"steps_per_print": "auto"}, r"steps_per_print: 'auto' is no value here"),
        ({"data_types": 5}, "data_types: 5: expected a section"),
        (
            {"data_types": {"grad_acum_dtype": "fp32"}},
            r"data_types\.grad_acum_dtype: unknown key \(did you mean 'grad_accum_dtype'",
        ),
        ({"data_types": {"grad_accum_dtype": "f32"}}, r"data_types\.grad_accum_dtype: 'f32': Input should be 'fp32' or 'bf16'"),
        ({"comms_logger": {"enable": True}}, r"comms_logger\.enable: unknown key"),
        ({"flops_profiler": {"profile_steps": 1}}, r"flops_profiler\.profile_steps: unknown key \(did you mean 'profile_step'"),
    ],
)
def test_what_is_no_deepspeed_file_is_refused(tmp_path: Path, values: object, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding) as caught:
        read_deepspeed(write(tmp_path, values))
    assert len(caught.value.findings) == 1


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({"fp16": {"enabled": True}}, "fp16: not supported here: experts that see few tokens overflow it"),
        ({"communication_data_type": "fp16"}, "communication_data_type: 'fp16' is not supported here: experts"),
        ({"aio": {}}, "aio: not supported here: optimizers on NVMe"),
        ({"compile": {"deepcompile": True}}, "compile: not supported here: h3scale does not compile"),
        ({"activation_checkpointing": {}}, "activation_checkpointing: the recipe owns this .set activation_checkpointing: true"),
        ({"bf16": {"bf16_optimizer_states": True}}, r"bf16\.bf16_optimizer_states: not supported here: .* fp32 master weights"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16_master_weights_and_grads: not supported here: .* fp32 master"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, r"zero_optimization\.zero_hpz_partition_size: .* ZeRO\+\+"),
        (
            {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}},
            "model_save: not supported here: .* h3scale checkpoint consolidate",
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "device: 'nvme' is not supported here: .*; cpu works"),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, "nvme_path: not supported here: .*; cpu works"),
        ({"expert_parallel": {"top_k": 2}}, r"expert_parallel\.top_k: not supported here: it is read from the model"),
        ({"zero_allow_untested_optimizer": False}, r"zero_allow_untested_optimizer: h3scale sets this \(true\)"),
    ],
)
def test_what_deepspeed_knows_and_is_refused_says_why(tmp_path: Path, values: object, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding) as caught:
        read_deepspeed(write(tmp_path, values))
    assert len(caught.value.findings) == 1
    assert "did you mean" not in str(caught.value)


def test_counts_may_be_written_as_people_write_large_ones(tmp_path: Path) -> None:
    path = Path(write(tmp_path, {}))
    path.write_text('{"steps_per_print": 1e9, "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7}}')
    assert read_deepspeed(str(path))["zero_optimization"]["reduce_bucket_size"] == 5e7


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


def keys_of(schema: type[BaseModel], section: str = "") -> Iterator[str]:
    """A section's keys as they are written in the file: under its alias, where a field has one."""
    for name, field in schema.model_fields.items():
        yield f"{section}.{field.alias or name}".removeprefix(".")


class Recorder(dict[str, Any]):
    """A dict that knows which keys it has been asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # `key in config.keys()` is how DeepSpeed asks for some
        return self

    def __copy__(self) -> "Recorder":
        return Recorder(self)

    def __deepcopy__(self, memo: Any) -> "Recorder":
        return Recorder(self)


def deepspeed_keys() -> set[str]:
    """The keys that the installed DeepSpeed reads: of the file, and of each section that h3scale allows."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    DeepSpeedConfig(Recorder(train_batch_size=1))  # type: ignore[arg-type]
    data_types = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    return {
        *Recorder.asked,
        *keys_of(DeepSpeedBF16Config, "bf16"),
        *keys_of(DeepSpeedZeroConfig, "zero_optimization"),
        *keys_of(DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param"),
        *keys_of(DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer"),
        *keys_of(DeepSpeedZeroLeafModuleConfig, "zero_optimization.leaf_module"),
        *keys_of(CommsLoggerConfig, "comms_logger"),
        *(f"flops_profiler.{name}" for name in vars(DeepSpeedFlopsProfilerConfig({}))),
        *(f"data_types.{getattr(constants, name)}" for name in data_types),
        *(f"expert_parallel.{field.name}" for field in fields(AutoEPConfig) if field.init),
    }


def allowed_keys(schema: type[BaseModel] = DeepSpeedFile, section: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"{section}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from allowed_keys(field.annotation, f"{section}{name}.")


REMOVED = {"zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"} | {
    "zero_optimization.zeropp_loco_param"  # DeepSpeed knows these by name only, to refuse them
}


def test_every_key_of_the_installed_deepspeed_is_allowed_or_refused_with_a_reason_and_no_other_is() -> None:
    allowed, told = set(allowed_keys()), {*OWNED, *SET_HERE, *UNSUPPORTED}
    assert not allowed & told
    assert allowed | told == deepspeed_keys() | REMOVED


@pytest.mark.parametrize(("experts", "ranks", "ranks_per_node", "found"), [(8, 16, 8, 8), (4, 8, 8, 4), (6, 8, 8, 2), (7, 8, 8, 1)])
def test_the_best_ep_size_divides_the_experts_and_the_ranks_of_a_node(
    experts: int, ranks: int, ranks_per_node: int, found: int
) -> None:
    words = ("ep_size=best", "data.rows_per_batch=16", "rows_per_micro_batch=1")
    config = complete({}, recipe(*words), "r.yaml", ranks, ("mixtral", experts), ranks_per_node)
    assert config["expert_parallel"]["autoep_size"] == found
    assert "expert_parallel" not in complete({}, recipe(*words), "r.yaml", ranks, None, ranks_per_node)
