"""Law 8 on DeepSpeed's own files: what a ZeRO-3 engine held, consolidation gives back bit for bit, and it computes the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h3scale.checkpoint.consolidate import consolidate, stored_as
from h3scale.checkpoint.shards import ModelFolder
from h3scale.checkpoint.verify import LOGIT_TOLERANCE, verify
from h3scale.checkpoint.zero import ZeroCheckpoint

pytestmark = pytest.mark.distributed

# name: world_size, ep_size, num_experts (0: dense), precision. Three ranks divide nothing here, so their shards are padded.
CASES = {
    "one-rank": (1, 1, 4, "fp32"),
    "ep1": (2, 1, 4, "fp32"),
    "ep2": (2, 2, 4, "fp32"),
    "ep2-bf16": (2, 2, 4, "bf16"),
    "dense": (2, 0, 0, "fp32"),
    "ep2-edp2": (4, 2, 4, "fp32"),
    "ep4": (4, 4, 4, "fp32"),
    "three-experts": (3, 3, 3, "fp32"),
    "padded": (3, 1, 4, "fp32"),
    "padded-dense": (3, 0, 0, "fp32"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """All cases, trained two steps by DeepSpeed and saved: CASE/step-000002, CASE/truth.safetensors, CASE/start.safetensors."""
    out = tmp_path_factory.mktemp("sharded")
    cases = [":".join(map(str, (name, *values))) for name, values in CASES.items()]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.shard_models", str(out), *cases]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module", params=CASES)
def case(request, sharded) -> str:
    return request.param


def test_consolidation_gives_back_what_the_engine_held_and_it_computes_the_same(case, sharded, tmp_path):
    world_size, ep_size, num_experts, precision = CASES[case]
    truth = load_file(sharded / case / "truth.safetensors")
    summary = consolidate(sharded / case, tmp_path / "out")
    assert (summary.world_size, summary.ep_size) == (world_size, max(ep_size, 1))
    written = ModelFolder(tmp_path / "out")
    moe_type = written.config["model_type"] if num_experts else None
    for name in written.files:
        stored, expert = stored_as(name, moe_type)
        held = truth[stored] if expert is None else truth[stored][expert]
        assert torch.equal(written.tensor(name).to(held.dtype), held), name  # bf16 engines keep an fp32 original
    report = verify(tmp_path / "out", sharded / case)
    assert report.num_equal_tensors == len(written.files)
    print(f"{case}: max abs logit difference {report.max_abs_difference:.1e}")
    assert report.max_abs_difference <= (LOGIT_TOLERANCE if precision == "fp32" else 0.05)


def test_the_reader_knows_every_tensor_of_the_engine_and_no_other(case, sharded):
    truth = load_file(sharded / case / "truth.safetensors")
    zero = ZeroCheckpoint(sharded / case / "step-000002" / "deepspeed")
    assert zero.specs.keys() == truth.keys()
    assert all(torch.equal(zero.tensor(name).to(held.dtype), held) for name, held in truth.items())
    assert zero.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_cases_pad_train_and_freeze(sharded):
    """Else equality above could hold for reasons that prove nothing."""
    zero = ZeroCheckpoint(sharded / "padded" / "step-000002" / "deepspeed")
    blocks = [block for entry in zero.entries.values() for block in entry.blocks.values()]
    assert any(block.part_numel * block.num_parts > torch.Size(block.shape).numel() for block in blocks)
    truth, start = (load_file(sharded / "padded" / f"{name}.safetensors") for name in ("truth", "start"))
    assert all(torch.equal(truth[name], start[name]) for name in truth if ".mlp." not in name)
    assert not torch.equal(truth["model.layers.0.mlp.router.gate.weight"], start["model.layers.0.mlp.gate.weight"])
    experts = truth["model.layers.0.mlp.experts.w1"]
    assert not torch.equal(experts[0], experts[1])
