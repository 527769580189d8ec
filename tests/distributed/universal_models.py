"""Run by test_universal.py: DeepSpeed's own loaders read a checkpoint, and make one more step.

    python -m tests.distributed.universal_models OUT MODEL FOLDER TAG universal|plain CASE

CASE is as in shard_models. The model is built from MODEL, a Hugging Face folder, and all that is trained is then spoiled, so that
only the loader can bring it back. OUT gets loaded.safetensors and after.safetensors: what the engine holds before and after a
step on a batch that is the same on every rank.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.distributed.forked import launch
from tests.distributed.shard_case import Case
from tests.distributed.shard_models import SIZES, settings, whole

deepspeed.ops.__compatible_ops__.update(deepspeed_shm_comm=False)  # else a C++ extension is compiled


def rank_main(out: Path, model: Path, folder: Path, tag: str, universal: bool, case: Case) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".mlp." in name or "frozen" not in case.options)
        if parameter.requires_grad:
            parameter.data.fill_(0.5)
    trained = [{"name": "trained", "params": [parameter for parameter in network.parameters() if parameter.requires_grad]}]
    config = settings(case) | {"checkpoint": {"load_universal": universal}}
    engine, *_ = deepspeed.initialize(model=network, config=config, model_parameters=trained)
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path
    for state in engine.optimizer.optimizer.state.values():  # DeepSpeed 0.19.8 gives all sub-groups of ZeRO-3 one tensor
        state["step"] = state["step"].clone()
    loaded = whole(engine, case)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(5))
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    after = whole(engine, case)
    if dist.get_rank() == 0:
        save_file(loaded, out / "loaded.safetensors")
        save_file(after, out / "after.safetensors")
        (out / "steps").write_text(str(engine.global_steps))
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    out, model, folder = map(Path, sys.argv[1:4])
    case = Case.read(sys.argv[6])
    launch(case.name, case.world_size, rank_main, out, model, folder, sys.argv[4], sys.argv[5] == "universal", case)
