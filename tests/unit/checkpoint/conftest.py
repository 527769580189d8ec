"""A tiny Mixtral folder with a tokenizer, and its weights as DeepSpeed would shard them, written here without DeepSpeed.

tests/distributed/test_consolidate.py shows that DeepSpeed's own files are read; here any topology costs milliseconds.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file, save_file

from h3scale.checkpoint import manifest
from h3scale.checkpoint.expected import stored_as
from h3scale.checkpoint.shards import write_json

NUM_EXPERTS = 4
WORDS = [f"w{i}" for i in range(30)]
SPECIAL = ["<pad>", "<unk>", "</s>"]
Edit = Callable[[int, dict[str, Any], dict[str, Any]], None]  # (rank, model state, optimizer state), changed in place


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder in hub layout: Mixtral with tied embeddings, experts of three alignments and a general one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    experts = {"alignments": ["helpful", "harmless", "honest"], "experts": ["helpful", "harmless", "honest", None]}
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(WORDS) + len(SPECIAL),
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        h3scale=experts,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
    return folder


def save_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS, *more])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(str(folder))


@pytest.fixture(scope="session")
def weights(model) -> dict[str, torch.Tensor]:
    """The folder's tensors."""
    return load_file(model / "model.safetensors")


@pytest.fixture
def shard(model, weights, probe, tmp_path) -> Callable[..., Path]:
    """Writes the model as a training checkpoint: shard(world_size=2, ep_size=2, stage=3, frozen=..., placement=..., edit=...)."""

    def write(name: str = "run", step: int = 3, **options: Any) -> Path:
        return write_training(tmp_path / name / f"step-{step:06d}", step, model, weights, probe, **options)

    return write


@pytest.fixture(scope="session")
def training(model, weights, probe, tmp_path_factory) -> Path:
    """A training checkpoint of two ranks, to be read only."""
    return write_training(tmp_path_factory.mktemp("run") / "step-000003", 3, model, weights, probe)


def write_training(
    folder: Path,
    step: int,
    model: Path,
    weights: dict[str, torch.Tensor],
    probe: dict[str, torch.Tensor],
    world_size: int = 2,
    ep_size: int = 2,
    stage: int = 3,
    **options: Any,
) -> Path:
    (folder / "model").mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / "model" / file.name).write_bytes(file.read_bytes())
    (write_zero3 if stage == 3 else write_zero12)(folder / "deepspeed", stacked(weights), world_size, ep_size, **options)
    save_file(probe, folder / "probe.safetensors")
    write_manifest(folder, step, world_size, ep_size)
    return folder


@pytest.fixture(scope="session")
def probe(model) -> dict[str, torch.Tensor]:
    """An input and the model's logits on it, as the trained engine would have given them."""
    from transformers import AutoModelForCausalLM

    input_ids, position_ids = torch.arange(20)[None], torch.arange(20)[None]
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        logits = network(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return {"input_ids": input_ids, "position_ids": position_ids, "logits": logits.contiguous()}


def write_manifest(folder: Path, step: int, world_size: int, ep_size: int) -> None:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    manifest.write_manifest(folder, {"step": step, "world_size": world_size, "ep_size": ep_size, "files": files})


def stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hub tensors under AutoEP's names, experts stacked."""
    found: dict[str, Any] = {}
    for name, values in weights.items():
        stored, expert = stored_as(name, "mixtral")
        if expert is None:
            found[stored] = values
        else:
            found.setdefault(stored, {})[expert] = values
    return {n: v if isinstance(v, torch.Tensor) else torch.stack([v[e] for e in sorted(v)]) for n, v in found.items()}


def part(values: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """Part `index` of `count` of the flattened values; the padding is NaN, so that it is seen when it leaks."""
    size = -(-values.numel() // count)
    padded = torch.cat([values.flatten(), torch.full((size * count - values.numel(),), float("nan"), dtype=values.dtype)])
    return padded[index * size : (index + 1) * size].clone()


def write_zero3(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    world_size: int,
    ep_size: int,
    frozen: Callable[[str], bool] = lambda name: ".mlp." not in name,
    placement: list[list[int]] | None = None,
    edit: Edit = lambda rank, model_state, optim_state: None,
) -> None:
    """The tag folder of DeepSpeed 0.19.8: dense and expert tensors in groups of their own, frozen ones as fragments."""
    folder.mkdir(parents=True)
    local = NUM_EXPERTS // ep_size
    placement = placement or [list(range(rank * local, (rank + 1) * local)) for rank in range(ep_size)]
    edp_size = world_size // ep_size
    still = {name: values for name, values in tensors.items() if frozen(name)}
    dense = {name: values for name, values in tensors.items() if name not in still and ".experts." not in name}
    for rank in range(world_size):
        ep_rank, edp_rank = rank % ep_size, rank // ep_size
        mine = {name: values[placement[ep_rank]] for name, values in tensors.items() if ".experts." in name}
        half = len(mine) // 2
        groups = [
            (dense, world_size, rank, "replicated"),
            (dict(list(mine.items())[:half]), edp_size, edp_rank, "autoep_expert"),
            (dict(list(mine.items())[half:]), edp_size, edp_rank, "autoep_expert"),
        ]
        prefixes = sorted({name.rpartition(".")[0] for name in mine})
        model_state = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: values.shape for name, values in group.items()} for group, *_ in groups],
            "frozen_param_shapes": {name: values.shape for name, values in still.items()},
            "frozen_param_fragments": {name: part(values, rank, world_size) for name, values in still.items()},
            "shared_params": {"lm_head.weight": "model.embed_tokens.weight"} if rank == 0 else {},
            "dp_world_size": world_size,
            "mp_world_size": 1,
            "ds_autoep_layers": [_layer(prefix, placement, ep_rank) for prefix in prefixes],
        }
        flat = [torch.cat([part(v, index, count) for v in group.values()] or [torch.empty(0)]) for group, count, index, _ in groups]
        metadata = [
            {"sub_group": i, "partition_count": count, "partition_rank": index, "families": [family]}
            for i, (_, count, index, family) in enumerate(groups)
        ]
        optim_state = {
            "optimizer_state_dict": {
                "zero_stage": ZeroStageEnum.weights,
                "loss_scaler": LossScaler(scale=1.0),
                "partition_count": world_size,
                "fp32_flat_groups": flat,
                "ds_zero_partition_groups": metadata,
            }
        }
        edit(rank, model_state, optim_state["optimizer_state_dict"])
        torch.save(model_state, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(optim_state, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _layer(prefix: str, placement: list[list[int]], ep_rank: int) -> dict[str, Any]:
    return {
        "expert_key_prefix": prefix,
        "num_experts": NUM_EXPERTS,
        "num_local_experts": len(placement[ep_rank]),
        "ep_size": len(placement),
        "ep_rank": ep_rank,
        "expert_placement": {"ranks": [{"rank": rank, "experts": experts} for rank, experts in enumerate(placement)]},
        "checkpoint_format": "zero3_partitioned",
        "checkpoint_format_version": 1,
    }


def write_zero12(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    world_size: int,
    ep_size: int,
    frozen: Callable[[str], bool] = lambda name: ".mlp." not in name,
    edit: Edit = lambda rank, model_state, optim_state: None,
) -> None:
    """The tag folder of DeepSpeed 0.19.8 under ZeRO-2; `edit` gets the one model state with each rank's optimizer state."""
    folder.mkdir(parents=True)
    local, edp_size = NUM_EXPERTS // ep_size, world_size // ep_size
    trained = {name: values for name, values in tensors.items() if not frozen(name)}
    prefixes = sorted({name.rpartition(".")[0] for name in tensors if ".experts." in name})
    placement = [list(range(rank * local, (rank + 1) * local)) for rank in range(ep_size)]
    files = {"checkpoint_format": "per_expert_files", "checkpoint_format_version": None}
    layers = [
        {**_layer(prefix, placement, 0), **files, "moe_layer_id": i, "module_path": prefix.removesuffix(".experts")}
        for i, prefix in enumerate(prefixes)
    ]
    groups = [[name for name in trained if ".experts." not in name], [name for name in trained if ".experts." in name]]
    groups = [names for names in groups if names]
    module = {name: values.bfloat16() if name in trained else values for name, values in tensors.items() if ".experts." not in name}
    seen = {name: values[: local if ".experts." in name else None] for name, values in trained.items()}  # by one rank
    model_state = {
        "module": module | {f"{layer['module_path']}.gate.gate.weight": torch.zeros(1) for layer in layers},
        "param_shapes": [{name: seen[name].shape for name in names} for names in groups],
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"},
        "dp_world_size": world_size,
        "ds_autoep_layers": layers,
    }
    for rank in range(world_size):
        optim_state: dict[str, Any] = {"zero_stage": ZeroStageEnum.gradients, "single_partition_of_fp32_groups": []}
        optim_state["param_slice_mappings"] = []
        for names in groups:
            is_expert = ".experts." in names[0]
            held = {name: trained[name][placement[rank % ep_size]] if is_expert else trained[name] for name in names}
            count, index = (edp_size, rank // ep_size) if is_expert else (world_size, rank)
            values, mapping = _partition(held, count, index)
            optim_state["single_partition_of_fp32_groups"].append(values)
            optim_state["param_slice_mappings"].append(mapping)
        edit(rank, model_state, optim_state)
        torch.save({"optimizer_state_dict": optim_state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save(model_state, folder / "mp_rank_00_model_states.pt")
    for i, prefix in enumerate(prefixes):
        for expert in range(NUM_EXPERTS):
            states = {f"{prefix}.{w}.{expert}": tensors[f"{prefix}.{w}"][expert].clone() for w in ("w1", "w2", "w3")}
            torch.save(states, folder / f"layer_{i}_expert_{expert}_mp_rank_00_model_states.pt")


def _partition(held: dict[str, torch.Tensor], count: int, index: int) -> tuple[torch.Tensor, dict[str, fragment_address]]:
    """A rank's part of the tensors laid one after another, and where in it each one's piece is."""
    flat = torch.cat([values.flatten() for values in held.values()])
    size = -(-flat.numel() // count)
    mapping, start = {}, 0
    for name, values in held.items():
        first, stop = max(start, index * size), min(start + values.numel(), (index + 1) * size)
        if first < stop:
            mapping[name] = fragment_address(numel=stop - first, start=first - index * size)
        start += values.numel()
    return part(flat, index, count), mapping


def with_adam(rank: int, model_state: dict[str, Any], optim_state: dict[str, Any]) -> None:
    """An `edit` for write_zero3: moments made of the values, after three steps, as AdamW of torch keeps them."""
    model_state.update(global_steps=3, skipped_steps=0, lr_scheduler=None)
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": -values, "exp_avg_sq": values.square()}
        for i, values in enumerate(optim_state["fp32_flat_groups"])
    }
    own = {"lr": 0.1, "betas": (0.9, 0.99)}
    groups = [own | {"weight_decay": 0.1 if i else 0.0, "params": [i], "name": f"group {i}"} for i in state]
    optim_state["optimizer_state_dict"] = {"state": state, "param_groups": groups}
