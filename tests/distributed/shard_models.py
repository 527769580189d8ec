"""Run by test_consolidate.py: trains tiny models with DeepSpeed ZeRO-3 and keeps the whole tensors beside the shards.

    python -m tests.distributed.shard_models OUT NAME:WORLD_SIZE:EP_SIZE:NUM_EXPERTS:PRECISION ...

Without experts EP_SIZE and NUM_EXPERTS are 0; PRECISION is fp32 or bf16.

OUT/NAME/step-000002 is a training checkpoint as h3scale.train writes it, OUT/NAME/truth.safetensors what the engine
really held (gathered by DeepSpeed, experts put in order by their EP rank), OUT/NAME/start.safetensors what it began with.
"""

import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.distributed.forked import launch

deepspeed.ops.__compatible_ops__.update(deepspeed_shm_comm=False)  # else a C++ extension is compiled

# 3 ranks divide none of the numbers of values, so ZeRO pads; plain transformers wants hidden and inner size in fours
# (its grouped GEMM asks for strides of 16 bytes).
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "tie_word_embeddings": True,
}
STEPS = 2
Case = tuple[str, int, int, str]  # name, ep_size, num_experts, precision


def build(num_experts: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if not num_experts:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        config = MixtralConfig(**SIZES, num_local_experts=num_experts, num_experts_per_tok=2, sliding_window=None)
        model = MixtralForCausalLM(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
    with torch.no_grad():
        for parameter in model.parameters():  # norms start as ones: equal values would hide a shuffle
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


def settings(ep_size: int, precision: str) -> dict:
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        # small sub-groups: a parameter group then lies in several flat groups
        "zero_optimization": {"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
        "bf16": {"enabled": precision == "bf16"},
    }
    if ep_size:
        values["expert_parallel"] = {
            "enabled": True,
            "autoep_size": ep_size,
            "preset_model": "mixtral",
            "use_grouped_mm": False,
        }
    return values


def whole(engine, ep_size: int) -> dict[str, torch.Tensor]:
    """All tensors as the engine holds them; an expert tensor is collected from the first EP group."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            here = parameter.detach().clone()
        if ".experts." in name:
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, here)
            tensors[name] = torch.cat(gathered[:ep_size])
            for other in range(ep_size, len(gathered)):  # replicas are equal, so the first group stands for all
                assert torch.equal(gathered[other], gathered[other % ep_size])
        else:
            tensors[name] = here
    return tensors


def run(out: Path, ep_size: int, num_experts: int, precision: str) -> None:
    model = build(num_experts)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings(ep_size, precision), model_parameters=trained)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        ids = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    probe = make_probe(engine)
    tensors = whole(engine, ep_size)
    step = out / f"step-{STEPS:06d}"
    engine.save_checkpoint(str(step), tag="deepspeed", save_latest=False)
    if dist.get_rank() == 0:
        save_file(tensors, out / "truth.safetensors")
        save_file(start, out / "start.safetensors")
        model.config.save_pretrained(step / "model")
        save_file(probe, step / "probe.safetensors")
        write_manifest(step, ep_size)
    dist.barrier()
    engine.destroy()


@torch.no_grad()
def make_probe(engine) -> dict[str, torch.Tensor]:
    input_ids = torch.arange(24)[None] * 7 % SIZES["vocab_size"]
    position_ids = torch.arange(24)[None]
    engine.eval()
    logits = engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return {"input_ids": input_ids, "position_ids": position_ids, "logits": logits.float().contiguous()}


def write_manifest(step: Path, ep_size: int) -> None:
    files = {
        str(path.relative_to(step)): {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in step.rglob("*")
        if path.is_file()
    }
    manifest = {"step": STEPS, "world_size": dist.get_world_size(), "ep_size": ep_size, "files": files}
    (step / "manifest.json").write_text(json.dumps(manifest))


def rank_main(out: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for name, ep_size, num_experts, precision in cases:
        run(out / name, ep_size, num_experts, precision)
    dist.destroy_process_group()


def main(out: Path, arguments: list[str]) -> None:
    by_world_size: dict[int, list[Case]] = {}
    for argument in arguments:
        name, world_size, ep_size, num_experts, precision = argument.split(":")
        by_world_size.setdefault(int(world_size), []).append((name, int(ep_size), int(num_experts), precision))
    for world_size, cases in by_world_size.items():
        launch(f"world size {world_size}", world_size, rank_main, out, cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
