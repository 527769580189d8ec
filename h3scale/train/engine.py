"""The only door to deepspeed.initialize."""

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.deepspeed import complete, read_deepspeed
from h3scale.config.recipe import Optimizer, TrainRecipe
from h3scale.errors import ConfigError
from h3scale.log import logger
from h3scale.model.experts import ExpertMap
from h3scale.model.families import AUTOEP_PRESETS, num_experts
from h3scale.model.lora import add_lora
from h3scale.model.start import check_tokenizer, load_model, load_tokenizer, random_llama
from h3scale.model.trainable import freeze, group_of, what_is_trained, whole_shape
from h3scale.train.anchor import expert_gammas
from h3scale.train.balance import check_balance
from h3scale.train.expert_compute import check_backend, use_experts
from h3scale.train.load import computes_in, empty_model, fill, freed_memory_returned, rounding


@dataclass
class Run:
    """An initialised engine and what belongs to it. `expert_map` is None for a dense model."""

    engine: Any
    tokenizer: Any
    config: Any
    expert_map: ExpertMap | None
    rank: int
    world_size: int
    micro_batches: int
    zero_stage: int
    ep_size: int

    @property
    def moe_type(self) -> str:
        return str(self.config.model_type)


def start(recipe: TrainRecipe, where: str) -> Run:
    """Loads or makes the model, freezes what the recipe does not train, and hands it to DeepSpeed.

    Every rank calls this. `where` names the recipe in findings. Raises what loading and the configs raise, before
    DeepSpeed is initialised where possible.
    """
    _one_core_a_rank()
    _quiet()
    import deepspeed

    # DeepSpeed would compile a C++ extension for shared-memory collectives at the first CPU run (minutes, and a
    # compiler on the machine); gloo was as fast on the sizes a CPU trains.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    values = read_deepspeed(recipe.deepspeed)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model)  # type: ignore[arg-type]
    expert_map, moe = _experts(recipe, where)
    ds_config = complete(values, recipe, where, world_size, moe, ranks_per_node(world_size))
    zero_stage = _stage(ds_config)
    _check_stage(zero_stage, ds_config, bool(moe), f"{where}: deepspeed: {recipe.deepspeed}")
    if expert_map:
        expert_gammas(recipe.drift, expert_map)  # its findings before anything is started
        check_balance(recipe.router, expert_map)
        check_backend(recipe.experts, ModelFolder(recipe.model or "").config, computes_in(ds_config))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=recipe.collective_timeout_s)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False, timeout=timeout)
    with freed_memory_returned():
        model = _model(recipe, tokenizer, ds_config)
        check_tokenizer(model, tokenizer, where)
        if recipe.lora:
            add_lora(model, recipe.lora)
        freeze(model, recipe.trainable)
        groups = _groups(model, recipe, ds_config)
        for line in what_is_trained(model, {group["name"].split(",")[0]: group["peak_lr"] for group in groups}):
            logger.info("%s", line)
        if recipe.activation_checkpointing:
            # Reentrant checkpoints would record the router's logits without their graph: a router loss without gradient.
            cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine, *_ = deepspeed.initialize(model=model, config=ds_config, optimizer=None, model_parameters=groups)
        use_experts(engine.module, recipe.experts)
        if recipe.model and zero_stage:
            fill(engine, Path(recipe.model))
            lost = rounding(ModelFolder(recipe.model), engine.module, computes_in(ds_config))
            if lost and dist.get_rank() == 0:
                logger.warning("%s", lost)
    _limit_all_groups(timeout)
    torch.manual_seed(recipe.seed * world_size + dist.get_rank())  # from here on only dropout draws, each rank its own
    return Run(
        engine=engine,
        tokenizer=tokenizer,
        config=model.config,
        expert_map=expert_map,
        rank=dist.get_rank(),
        world_size=world_size,
        micro_batches=ds_config["gradient_accumulation_steps"],
        zero_stage=zero_stage,
        ep_size=ds_config.get("expert_parallel", {}).get("autoep_size", 1),
    )


def _experts(recipe: TrainRecipe, where: str) -> tuple[ExpertMap | None, tuple[str, int] | None]:
    """The expert map of the recipe's model, and (AutoEP preset, number of experts); None for a dense one."""
    if recipe.init == "random":
        return None, None
    config = ModelFolder(recipe.model or "").config
    if num_experts(config) is None:
        return None, None
    expert_map, family = ExpertMap.from_config(config), config.get("model_type", "")
    findings = []
    if family not in AUTOEP_PRESETS:
        findings.append(f"{recipe.model} is '{family}', which cannot be trained (works: {', '.join(AUTOEP_PRESETS)})")
    if expert_map is None:
        findings.append(f"{recipe.model} has experts, but its config names no alignments (h3scale fuse writes them)")
    if findings or expert_map is None:
        raise ConfigError([f"{where}: model: {finding}" for finding in findings])
    return expert_map, (AUTOEP_PRESETS[family], expert_map.num_experts)


def _limit_all_groups(timeout: timedelta) -> None:
    """Gives every process group the timeout: DeepSpeed makes those of the experts with torch's default."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def ranks_per_node(unknown: int) -> int:
    """As the launcher says; `unknown` where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or unknown)


def _one_core_a_rank() -> None:
    """On a CPU, ranks of one machine share its cores; the deepspeed launcher leaves every rank all of them."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_per_node(1)))


def _quiet() -> None:
    """Spares people what they can do nothing about: DeepSpeed's greetings and torch's renamed collectives."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Else DeepSpeed starts numactl to count devices, for every bucket of gradients.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _model(recipe: TrainRecipe, tokenizer: Any, ds_config: dict[str, Any]) -> torch.nn.Module:
    """The model that DeepSpeed gets: of random weights, empty and cut (ZeRO-3, for `fill`), or whole on every rank."""
    if recipe.architecture and recipe.init == "random":
        return random_llama(recipe.architecture, tokenizer, recipe.seed, recipe.data.sequence_length)
    folder = Path(recipe.model or "")
    return empty_model(folder, ds_config) if _stage(ds_config) == 3 else load_model(folder, computes_in(ds_config))


def check_savable(recipe: TrainRecipe, where: str) -> None:
    """ConfigError (78) for frozen experts: DeepSpeed cannot save them, and would say so after the training."""
    _, moe = _experts(recipe, where)
    if moe and not {"all", "experts", "ffn"} & set(recipe.trainable):
        raise ConfigError(
            f"{where}: trainable: the experts are frozen, and DeepSpeed cannot save that "
            "(works: experts among `trainable`, with optimizer.learning_rates: {experts: 0})"
        )


def _check_stage(zero_stage: int, ds_config: dict[str, Any], has_experts: bool, where: str) -> None:
    """ConfigError (78) for stages that cannot do what is asked of them.

    Experts need sharding; masters of bf16 are hidden by DeepSpeed at stage 0; with an offloaded optimizer stages 1 and 2 take the
    norm of the gradients before the drift's is added.
    """
    bf16 = computes_in(ds_config) != torch.float32
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    findings = [
        (zero_stage == 0 and has_experts, "experts need sharding (works: 1, 2, 3)"),
        (zero_stage == 0 and bf16, "bf16 needs it for its fp32 masters (works: 1, 2, 3)"),
        (zero_stage in (1, 2) and has_experts and offload, "experts with offload_optimizer need 3 (works: 3, or no offload)"),
    ]
    if any(holds for holds, _ in findings):
        raise ConfigError([f"{where} has ZeRO stage {zero_stage}, and {reason}" for holds, reason in findings if holds])


def _stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _groups(model: torch.nn.Module, recipe: TrainRecipe, ds_config: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, vectors and the router without; each with its learning rate.

    The optimizer itself is put into `ds_config`: DeepSpeed must build it after AutoEP has replaced the experts.
    """
    optimizer = recipe.optimizer
    ds_config["optimizer"] = {
        "type": "AdamW",
        "params": {
            "lr": optimizer.learning_rate,
            "betas": list(optimizer.betas),
            "weight_decay": optimizer.weight_decay,
            **_implementation(ds_config),
        },
    }
    trained = [(group_of(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = learning_rates(optimizer, {group for group, _ in trained})
    groups: dict[str, dict[str, Any]] = {}
    for group, parameter in trained:
        decay = 0.0 if group == "router" or len(whole_shape(parameter)) < 2 else optimizer.weight_decay
        # DeepSpeed splits groups into dense and expert ones and needs their names for it
        name = f"{group}, {'decay' if decay else 'no decay'}"
        empty = {"name": name, "lr": rates[group], "peak_lr": rates[group], "weight_decay": decay, "params": []}
        groups.setdefault(name, empty)["params"].append(parameter)
    return list(groups.values())


def _implementation(ds_config: dict[str, Any]) -> dict[str, bool]:
    """Which AdamW: DeepSpeedCPUAdam where a GPU's optimizer is offloaded, else torch's, fused on a GPU (no compiler needed)."""
    if not torch.cuda.is_available():
        return {"torch_adam": True}
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return {} if offload != "none" else {"torch_adam": True, "fused": True}


def learning_rates(optimizer: Optimizer, trained: set[str]) -> dict[str, float]:
    """The learning rate of each trained group, by the model's own names. ConfigError (78) for another group that has one."""
    rates: dict[str, float] = {str(group): rate for group, rate in optimizer.learning_rates.items()}
    if "ffn" in rates and "experts" in trained:  # as in `trainable`
        rates["experts"] = rates.pop("ffn")
    idle = sorted(rates.keys() - trained)
    if idle:
        works = ", ".join(sorted(trained))
        raise ConfigError([f"optimizer.learning_rates: '{group}' is not trained (works: {works})" for group in idle])
    return {group: rates.get(group, optimizer.learning_rate) for group in trained}


def set_learning_rate(engine: Any, share: float) -> None:
    """Sets every group's learning rate to `share` of its peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
