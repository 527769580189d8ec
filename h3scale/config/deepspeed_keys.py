"""What a ds_config may say: DeepSpeed's own keys, section by section, and why some of them are not supported here.

A test holds both against the installed DeepSpeed: each of its keys is either here or in UNSUPPORTED.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from h3scale.config.strict import Strict


def _whole(value: Any) -> Any:
    """5e8 is how people write large counts, and a float in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Bf16(Strict):
    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True


class DataTypes(Strict):
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"


class OffloadParam(Strict):
    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class OffloadOptimizer(Strict):
    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    ratio: Share = 1.0


class LeafModule(Strict):
    classes: list[str] = Field(default_factory=list)
    names: list[str] = Field(default_factory=list)
    name_suffixes: list[str] = Field(default_factory=list)


class ZeroOptimization(Strict):
    stage: Annotated[Count, Field(le=3)] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Count = 0
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Count = 0
    overlap_comm: bool = True
    load_from_fp32_weights: bool = True
    offload_param: OffloadParam = OffloadParam()
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    sub_group_size: Count = 0
    stage3_max_live_parameters: Count = 0
    stage3_max_reuse_distance: Count = 0
    stage3_prefetch_bucket_size: Count = 0
    stage3_param_persistence_threshold: Count = 0
    stage3_model_persistence_threshold: Count = 0
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    round_robin_gradients: bool = False
    memory_efficient_linear: bool = True
    ignore_unused_parameters: bool = True
    leaf_module: LeafModule = LeafModule()
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class ExpertParallel(Strict):
    combine_impl: Literal["weighted_sum", "fused_weighted_sum", "legacy_bmm"] = "weighted_sum"
    row_weighting_impl: Literal["eager", "fused"] = "eager"
    comm_backend: Literal["comm", "deepep"] = "comm"
    comm_num_sm: Count = 0
    comm_qp_margin: Count = 0
    comm_max_tokens_per_rank: Count = 0
    async_split_plan: bool = False
    validate_folding_routing: bool = False


class CommsLogger(Strict):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Strict):
    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: Count = 1
    module_depth: int = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class DeepSpeedFile(Strict):
    """A ds_config. Only keys and types count: what is left out has DeepSpeed's default, not the one written here."""

    bf16: Bf16 = Bf16()
    zero_optimization: ZeroOptimization = ZeroOptimization()
    expert_parallel: ExpertParallel = ExpertParallel()
    data_types: DataTypes = DataTypes()
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    communication_data_type: Literal["fp32", "bf16"] = "bf16"
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(default=1.0, gt=0)
    steps_per_print: Annotated[Count, Field(ge=1)] = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False


# What the recipe owns, and the recipe's word for it. A file that sets one of these too would have two masters.
OWNED = {
    "train_batch_size": "data.rows_per_batch",
    "train_micro_batch_size_per_gpu": "rows_per_micro_batch",
    "gradient_accumulation_steps": "data.rows_per_batch, rows_per_micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "activation_checkpointing": (
        "activation_checkpointing: true; DeepSpeed's section is for models that call its own function, and has no effect here"
    ),
    "expert_parallel.autoep_size": "ep_size",
    **dict.fromkeys(
        [f"expert_parallel.{key}" for key in ("use_grouped_mm", "disable_triton_grouped_mm", "gate_up_impl")], "experts"
    ),
    **dict.fromkeys(("tensorboard", "wandb"), "tracking"),
}
# What h3scale itself hands to DeepSpeed, and by what it goes.
SET_HERE = {
    "expert_parallel.enabled": "by the model: on for a mixture of experts",
    "expert_parallel.preset_model": "by the model's family",
    "zero_allow_untested_optimizer": "true",
    "zero_force_ds_cpu_optimizer": "by whether there is a GPU",
}

_FP16 = "experts that see few tokens overflow it; bf16 has the range of fp32"
_MASTERS = "it takes away the fp32 master weights and moments, without which small updates are lost, and which are what is released"
_NVME = "optimizers on NVMe cannot be saved with experts under ZeRO-3, and nothing here is tested with it; cpu works"
_SUPERCHIP = "it is for machines whose CPU and GPU share memory, and untested with experts"
_ZERO_PLUS_PLUS = "ZeRO++ is untested with experts, which are sharded over groups of their own"
_QUANTIZED = f"{_ZERO_PLUS_PLUS}, and quantizing changes the numbers"
_SAVES = "checkpoints are written by h3scale itself; h3scale checkpoint consolidate gathers a model from them, in fp32"
_RENAMED = "an old name; offload_optimizer and offload_param with {device: cpu} work"
_LOADS = "h3scale makes and fills the model itself"
_TRACKED = "the recipe's `tracking` knows tensorboard, wandb and trackio"
_DATA = "the recipe's `data` decides what a batch is made of"
_PARALLEL = "ranks are shared out by ZeRO and by experts alone"
_MODEL = "it is read from the model, with which it has to agree"
_DTYPES = "weights are as bf16.enabled says, buffers as the model needs them (rotary frequencies in fp32)"
_SERVING = "it is for inference, not for training"
_REMOVED = "DeepSpeed has removed it, and refuses it"
# Keys that DeepSpeed knows, and the reason why they are refused all the same.
UNSUPPORTED = {
    "fp16": _FP16,
    "bfloat16": "an old name of bf16, which works",
    "torch_autocast": "bf16.enabled says what is computed in bf16",
    "aio": _NVME,
    "compile": "h3scale does not compile the model",
    **dict.fromkeys(("csv_monitor", "comet"), _TRACKED),
    **dict.fromkeys(("data_efficiency", "curriculum_learning", "dataloader_drop_last"), _DATA),
    **dict.fromkeys(
        ("pipeline", "tensor_parallel", "seq_parallel_communication_data_type", "use_data_before_expert_parallelism"), _PARALLEL
    ),
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _SAVES),
    **dict.fromkeys(("hybrid_engine", "weight_quantization"), _SERVING),
    "autotuning": "it starts runs of its own, with batch sizes that the recipe owns",
    **dict.fromkeys(
        ("gradient_allreduce_op", "managed_gradient_accumulation"),
        "losses are divided by counts of the whole batch, which rests on means over all ranks at the step's end",
    ),
    **dict.fromkeys(("log_level", "timers", "disable_python_gc", "disable_allgather", "vocabulary_size"), "it has no use here"),
    **dict.fromkeys(
        (
            *("amp", "compression_training", "eigenvalue", "elasticity", "graph_harvesting"),
            *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
        ),
        _REMOVED,
    ),
    **dict.fromkeys(("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"), _MASTERS),
    **dict.fromkeys(("data_types.param_dtype", "data_types.buffer_dtype", "data_types.keep_in_fp32_modules"), _DTYPES),
    **{
        f"zero_optimization.{key}": reason
        for key, reason in {
            "compute_grad_norm": "clipping and the metrics need the norm",
            "elastic_checkpoint": _SAVES,
            "stage3_gather_16bit_weights_on_model_save": _SAVES,
            "stage3_gather_fp16_weights_on_model_save": _SAVES,
            "zenflow": "it updates weights late, and is untested with experts",
            **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), _RENAMED),
            "legacy_stage1": "stages 1 to 3 work",
            "parameter_alignment": "it pads shards in a way that is untested here",
            "zero_hpz_partition_size": _ZERO_PLUS_PLUS,
            "zero_quantized_weights": _QUANTIZED,
            "zero_quantized_nontrainable_weights": _QUANTIZED,
            "zero_quantized_gradients": _QUANTIZED,
            "pipeline_loading_checkpoint": _LOADS,
            "override_module_apply": _LOADS,
            "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
            **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _REMOVED),
            **{f"offload_param.{k}": _NVME for k in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")},
            **{
                f"offload_optimizer.{k}": _NVME
                for k in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
            },
            **{f"offload_optimizer.{k}": _SUPERCHIP for k in ("super_offload", "cpuadam_cores_perc")},
        }.items()
    },
    **{
        f"expert_parallel.{key}": _MODEL
        for key in (
            *("moe_layer_pattern", "expert_pattern", "router_pattern", "route_norm", "route_scale", "score_apply", "score_func"),
            *("top_k", "routed_scaling_factor", "num_expert_groups", "num_limited_groups", "expert_w1", "expert_w2", "expert_w3"),
            *("num_experts_attr", "top_k_attr", "has_shared_experts", "shared_experts_pattern", "shared_experts_gate_pattern"),
            "expert_activation",
        )
    },
    "expert_parallel.load_balance_coeff": "DeepSpeed does not support it; router.balance_weight in the recipe does",
    "expert_parallel.expert_tensor_parallel_size": _PARALLEL,
}
# Values that DeepSpeed knows as well.
UNSUPPORTED_VALUES = {
    ("zero_optimization.offload_param.device", "nvme"): _NVME,
    ("zero_optimization.offload_optimizer.device", "nvme"): _NVME,
    ("communication_data_type", "fp16"): _FP16,
    ("data_types.grad_accum_dtype", "fp16"): _FP16,
}
