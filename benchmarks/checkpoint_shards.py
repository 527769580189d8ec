"""Training checkpoints of any size with random weights, as DeepSpeed 0.19 lays them out under ZeRO-3, without training one."""

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.autoep_affine import make_autoep_placement_descriptor
from measure import Row
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import DCP_SHARDING_INFO_KEY, DCP_VERSION_KEY, HF_DCP_VERSION, SAVED_OFFSETS_KEY

from h3scale.checkpoint.expected import expected_shapes, stored_as

TAG = "deepspeed"
NUM_EXPERTS = 4
VOCAB = 32_000
SIZES: dict[str, tuple[int, int, int]] = {  # hidden_size, intermediate_size, num_hidden_layers
    "tiny": (64, 96, 2),
    "0.05 B": (512, 1408, 8),
    "0.3 B": (1024, 2816, 18),
    "1 B": (1536, 4096, 34),
}
SIZES_OF_EXPERTS: dict[str, tuple[int, int, int]] = {"tiny": (64, 96, 2), "0.05 B": (384, 1024, 5)}


def write_checkpoint(folder: Path, size: str, world_size: int, ep_size: int = 0, adam: bool = False) -> int:
    """`folder`/model (config.json) and `folder`/deepspeed; gives the number of parameters. `ep_size` 0: a dense Llama.

    `adam`: with the optimizer's two moments, which other converters ask for; they are three times as many bytes.
    """
    (folder / "model").mkdir(parents=True)
    (folder / TAG).mkdir()
    config = _config(size, ep_size)
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes: dict[str, torch.Size] = {}
    for name, shape in expected_shapes(config, folder).items():
        stored, expert = stored_as(name, config["model_type"])
        shapes[stored] = torch.Size(shape if expert is None else (NUM_EXPERTS // ep_size, *shape))
    dense = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    experts = {name: shape for name, shape in shapes.items() if name not in dense}
    for rank in range(world_size):
        generator = torch.Generator().manual_seed(rank)
        groups = [(dense, world_size, rank, "replicated")]
        if ep_size:
            groups.append((experts, world_size // ep_size, rank // ep_size, "autoep_expert"))
        flat = [_values(sum(-(-shape.numel() // count) for shape in names.values()), generator) for names, count, *_ in groups]
        model, optim = _states(groups, flat, rank, world_size, ep_size, adam)
        torch.save(model, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(optim, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return sum(shape.numel() * (ep_size if name in experts else 1) for name, shape in shapes.items())


def _states(groups: list[Any], flat: list[torch.Tensor], rank: int, world_size: int, ep_size: int, adam: bool) -> tuple[Row, Row]:
    layers = sorted({name.rpartition(".")[0] for name in groups[-1][0]}) if ep_size else []
    described = [_layer(prefix, i, rank, ep_size, world_size // ep_size) for i, prefix in enumerate(layers)]
    model: Row = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [names for names, *_ in groups],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
        "ds_version": "0.19.8",
        "global_steps": 1,
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 3}},
    }
    if ep_size:
        patterns = {"expert_parameter_patterns": [r".*\.experts\.w[123]$"], "ds_autoep_layers": described}
        model |= {"ds_autoep_layers": described, "universal_checkpoint_info": {"universal_checkpoint_version": 0.4, **patterns}}
    moments = {i: {"exp_avg": values * 0.1, "exp_avg_sq": values.square(), "step": 1.0} for i, values in enumerate(flat) if adam}
    optim: Row = {
        "zero_stage": 3,
        "partition_count": world_size,
        "fp32_flat_groups": flat,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [i]} for i in range(len(flat))]},
    }
    if ep_size:
        optim["ds_zero_partition_groups"] = [
            {"sub_group": i, "partition_count": count, "partition_rank": index, "families": [family]}
            for i, (_, count, index, family) in enumerate(groups)
        ]
    return model, {"optimizer_state_dict": optim, "ds_version": "0.19.8"}


def _layer(prefix: str, index: int, rank: int, ep_size: int, edp_size: int) -> Row:
    local = NUM_EXPERTS // ep_size
    ep_rank, edp_rank = rank % ep_size, rank // ep_size
    placed = [list(range(rank * local, (rank + 1) * local)) for rank in range(ep_size)]
    return {
        "moe_layer_id": index,
        "module_path": prefix.removesuffix(".experts"),
        "expert_key_prefix": prefix,
        "num_experts": NUM_EXPERTS,
        "num_local_experts": local,
        "ep_size": ep_size,
        "ep_rank": ep_rank,
        "ep_group_name": f"ep_size_{ep_size}",
        "expert_placement": make_autoep_placement_descriptor(NUM_EXPERTS, placed),
        "expert_data_parallel_rank": edp_rank,
        "expert_data_parallel_world_size": edp_size,
        "global_expert_start": ep_rank * local,
        "global_expert_end": (ep_rank + 1) * local,
        "checkpoint_format": "zero3_partitioned",
        "checkpoint_format_version": 1,
    }


def _values(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(count).normal_(generator=generator)


def _config(size: str, ep_size: int) -> Row:
    hidden, inner, layers = (SIZES_OF_EXPERTS if ep_size else SIZES)[size]
    config: Row = {
        "model_type": "mixtral" if ep_size else "llama",
        "architectures": ["MixtralForCausalLM" if ep_size else "LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB if size != "tiny" else 200,
        "tie_word_embeddings": False,
    }
    return config | ({"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2} if ep_size else {})


def write_fsdp_shards(folder: Path, weights: Path, world_size: int) -> None:
    """The tensors of a safetensors file as FSDP's ranks save them with torch's HuggingFaceStorageWriter: rows over the ranks."""
    folder.mkdir(parents=True)
    with safe_open(weights, framework="pt") as whole:
        for rank in range(world_size):
            shards, offsets = {}, {}
            for name in whole.keys():  # noqa: SIM118 (no mapping)
                rows, *others = whole.get_slice(name).get_shape()
                each = -(-rows // world_size)
                shards[name] = whole.get_slice(name)[min(rank * each, rows) : (rank + 1) * each].contiguous()
                offsets[name] = {SAVED_OFFSETS_KEY: [min(rank * each, rows), *(0 for _ in others)]}
            about = {DCP_SHARDING_INFO_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION), "format": "pt"}
            save_file(shards, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=about)
