"""Run by test_consolidate.py: trains tiny models with DeepSpeed and keeps the whole tensors beside the shards.

    python -m tests.distributed.shard_models OUT NAME:WORLD_SIZE:STAGE:EP_SIZE:NUM_EXPERTS:PRECISION[:OPTION...] ...

Without experts EP_SIZE and NUM_EXPERTS are 0; PRECISION is fp32 or bf16. Options: `frozen` trains the FFNs only, `offload` keeps
the optimizer where DeepSpeed's offload does, `sums` adds gradients up in fp32 (another optimizer class under bf16 and ZeRO-1).

OUT/NAME/step-000002 is a training checkpoint as h3scale.train writes it, OUT/NAME/truth.safetensors what the engine
really held (gathered by DeepSpeed, experts put in order by their EP rank), OUT/NAME/start.safetensors what it began with.
"""

import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from h3scale.checkpoint import manifest
from tests.distributed.forked import launch
from tests.distributed.shard_case import Case

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


def build(num_experts: int, options: tuple[str, ...]) -> torch.nn.Module:
    torch.manual_seed(0)
    if not num_experts:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        config = MixtralConfig(**SIZES, num_local_experts=num_experts, num_experts_per_tok=2, sliding_window=None)
        model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name or "frozen" not in options)
    with torch.no_grad():
        for parameter in model.parameters():  # norms start as ones: equal values would hide a shuffle
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


def settings(case: Case) -> dict:
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        # small sub-groups: a parameter group then lies in several flat groups
        "zero_optimization": {"stage": case.stage, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    if "offload" in case.options:
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        values["zero_force_ds_cpu_optimizer"] = False  # its own Adam would be compiled
    if "sums" in case.options:
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.ep_size:
        values["expert_parallel"] = {
            "enabled": True,
            "autoep_size": case.ep_size,
            "preset_model": "mixtral",
            "use_grouped_mm": False,
        }
    return values


def whole(engine, case: Case) -> dict[str, torch.Tensor]:
    """All tensors as the engine holds them; an expert tensor is collected from the first EP group."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if case.stage == 3 else nullcontext():
            here = parameter.detach().clone()
        if ".experts." in name:
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, here)
            tensors[name] = torch.cat(gathered[: case.ep_size])
            for other in range(case.ep_size, len(gathered)):  # replicas are equal, so the first group stands for all
                assert torch.equal(gathered[other], gathered[other % case.ep_size])
        else:
            tensors[name] = here
    return tensors


def run(out: Path, case: Case) -> None:
    model = build(case.num_experts, case.options)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [{"name": "trained", "params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    engine, *_ = deepspeed.initialize(model=model, config=settings(case), model_parameters=trained)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        ids = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    probe = make_probe(engine)
    tensors = whole(engine, case)
    step = out / f"step-{STEPS:06d}"
    engine.save_checkpoint(str(step), tag="deepspeed", save_latest=False)
    if dist.get_rank() == 0:
        save_file(tensors, out / "truth.safetensors")
        save_file(start, out / "start.safetensors")
        model.config.save_pretrained(step / "model")
        save_file(probe, step / "probe.safetensors")
        write_manifest(step, max(case.ep_size, 1))
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
    manifest.write_manifest(step, {"step": STEPS, "world_size": dist.get_world_size(), "ep_size": ep_size, "files": files})


def rank_main(out: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for case in cases:
        run(out / case.name, case)
    dist.destroy_process_group()


def main(out: Path, arguments: list[str]) -> None:
    by_world_size: dict[int, list[Case]] = {}
    for case in map(Case.read, arguments):
        by_world_size.setdefault(case.world_size, []).append(case)
    for world_size, cases in by_world_size.items():
        launch(f"world size {world_size}", world_size, rank_main, out, cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
