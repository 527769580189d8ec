"""DeepSpeed's JSON: read, checked (DeepSpeed itself accepts typos in silence) and completed from the recipe."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from h3scale.config.base import find
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError
from h3scale.topology import Topology, best_ep_size, divisors

# What the recipe owns, and the recipe's word for it. A file that sets one of these too would have two masters.
OWNED = {
    "train_batch_size": "data.rows_per_batch",
    "train_micro_batch_size_per_gpu": "rows_per_micro_batch",
    "gradient_accumulation_steps": "data.rows_per_batch, rows_per_micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}
KNOWN = {
    "bf16",
    "zero_optimization",
    "expert_parallel",
    "activation_checkpointing",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "prescale_gradients",
    "gradient_predivide_factor",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "aio",
    "compile",
}
ZERO_OPTIMIZATION = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "load_from_fp32_weights",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "round_robin_gradients",
    "memory_efficient_linear",
    "ignore_unused_parameters",
    "leaf_module",
}
EXPERT_PARALLEL = {
    "enabled": "by the model: on for a mixture of experts",
    "autoep_size": "ep_size",
    "preset_model": "by the model's family",
}
EXPERT_PARALLEL_FREE = {
    "use_grouped_mm",
    "disable_triton_grouped_mm",
    "combine_impl",
    "row_weighting_impl",
    "gate_up_impl",
    "comm_backend",
    "comm_num_sm",
    "comm_qp_margin",
    "comm_max_tokens_per_rank",
    "async_split_plan",
    "validate_folding_routing",
}


SECTIONS = {
    "zero_optimization": ZERO_OPTIMIZATION,
    "zero_optimization.offload_param": {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"},
    "zero_optimization.offload_optimizer": {
        "device",
        "nvme_path",
        "buffer_count",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
        "ratio",
        "super_offload",
        "cpuadam_cores_perc",
    },
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"},
    "activation_checkpointing": {
        "partition_activations",
        "number_checkpoints",
        "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary",
        "profile",
        "cpu_checkpointing",
    },
}


def read_deepspeed(path: str) -> dict[str, Any]:
    """The JSON of a ds_config; ConfigError (78) with all findings for owned or unknown keys and for "auto"."""
    file = find(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    sections = [key for key in ("expert_parallel", *SECTIONS) if not isinstance(values.get(key, {}), dict)]
    if sections:
        raise ConfigError([f"{path}: {key}: expected a JSON object" for key in sections])
    findings = [f"{path}: {key}: the recipe owns this (set {OWNED[key]} there)" for key in values if key in OWNED]
    findings += [_unknown(path, key, key, KNOWN) for key in values if key not in KNOWN and key not in OWNED]
    expert_parallel = values.get("expert_parallel", {})
    findings += [
        f"{path}: expert_parallel.{key}: h3scale sets this ({EXPERT_PARALLEL[key]})"
        for key in expert_parallel
        if key in EXPERT_PARALLEL
    ]
    findings += [
        _unknown(path, f"expert_parallel.{key}", key, EXPERT_PARALLEL_FREE)
        for key in expert_parallel
        if key not in EXPERT_PARALLEL_FREE and key not in EXPERT_PARALLEL
    ]
    for section, known in SECTIONS.items():
        inside: Any = values
        for name in section.split("."):
            inside = inside.get(name, {}) if isinstance(inside, dict) else {}
        if isinstance(inside, dict):
            findings += [_unknown(path, f"{section}.{key}", key, known) for key in inside if key not in known]
    findings += [f"{path}: {place}: 'auto' is no value here (write a number)" for place in _autos(values, "")]
    zero = values.get("zero_optimization", {})
    findings += [
        f"{path}: zero_optimization.{key}: expected a JSON object"
        for key in ("offload_param", "offload_optimizer")
        if not isinstance(zero.get(key, {}), dict)
    ]
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        findings.append(f"{path}: zero_optimization.stage: {zero['stage']!r} (works: 0, 1, 2, 3)")
    if findings:
        raise ConfigError(findings)
    return values


def complete(
    values: dict[str, Any],
    recipe: TrainRecipe,
    where: str,
    world_size: int,
    moe: tuple[str, int] | None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """The dict for deepspeed.initialize. `moe`: (AutoEP preset, number of experts), or None for a dense model.

    `ranks_per_node` is what `ep_size: best` goes by; all ranks when it is not given.

    Raises ConfigError (78) when the ranks do not divide the batch, or ep_size does not divide ranks and experts.
    """
    rows, micro = recipe.data.rows_per_batch, recipe.rows_per_micro_batch
    findings = []
    if rows % (micro * world_size):
        works = [str(d) for d in divisors(rows) if rows % (d * world_size) == 0]
        findings.append(
            f"{where}: rows_per_micro_batch: {micro} x {world_size} ranks does not divide data.rows_per_batch = {rows} "
            f"(works: {', '.join(works) or f'no value; use a number of ranks that divides {rows}'})"
        )
    ep_size = recipe.ep_size if recipe.ep_size != "best" else best_ep_size(moe[1] if moe else 1, ranks_per_node or world_size)
    if moe:
        try:
            Topology(world_size, ep_size, moe[1])
        except ConfigError as error:
            findings += [f"{where}: {finding}" for finding in error.findings]
    elif ep_size != 1:
        findings.append(f"{where}: ep_size: {recipe.ep_size}, but the model is dense and has no experts (works: 1)")
    if findings:
        raise ConfigError(findings)
    config = dict(values)
    config.update(
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=rows // (micro * world_size),
        gradient_clipping=recipe.optimizer.clip_norm,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # torch's takes its place where there is no GPU
    )
    if moe:
        chosen = {"enabled": True, "autoep_size": ep_size, "preset_model": moe[0]}
        config["expert_parallel"] = {**values.get("expert_parallel", {}), **chosen}
    else:
        config.pop("expert_parallel", None)
    return config


def _autos(value: Any, place: str) -> Iterator[str]:
    """Where "auto" stands: the Trainer of transformers fills it in, DeepSpeed itself turns it into anything."""
    if value == "auto":
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{place}.{key}" if place else key)


def _unknown(path: str, shown: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"{path}: {shown}: unknown key ({f'did you mean {near[0]!r}?' if near else 'DeepSpeed would ignore it'})"
