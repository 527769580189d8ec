"""Training on one GPU as on a cluster's: NCCL, bf16, grouped GEMM, fused AdamW, offload; beside the same run on the CPU.

python -m pytest -m gpu tests/gpu
"""

import json
from pathlib import Path

import pytest
import torch

from h3scale.launch.local import rank_command, run_ranks
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

STEPS = 8
TOLERANCE = 0.05  # of a loss: bf16 has eight bits, and rounding adds up over the steps


def lines(world: Path, out: Path, deepspeed: str, monkeypatch: pytest.MonkeyPatch, *overrides: str, gpu: bool = True) -> list[dict]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if gpu else "")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    words = [str(world / "recipe.yaml"), f"out={out}", f"deepspeed=ds_configs/{deepspeed}.json", f"steps={STEPS}", *overrides]
    assert run_ranks(rank_command("h3scale.train", words), 1) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), EXPERTS)


@pytest.mark.parametrize("deepspeed", ["zero3_ep", "zero3_ep_offload", "zero2_ep"])
@pytest.mark.parametrize("more", [(), ("drift.kind=activations", "activation_checkpointing=true", "lora={rank: 4}")])
def test_losses_on_the_gpu_are_those_on_the_cpu_but_for_bf16(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed: str, more: tuple[str, ...]
) -> None:
    found = lines(world, tmp_path / "gpu", deepspeed, monkeypatch, *more)
    expected = lines(world, tmp_path / "cpu", "cpu_debug", monkeypatch, *more, gpu=False)
    for one, other in zip(found, expected, strict=True):
        for name in ("lm", "router", "router_z"):
            assert one[name] == pytest.approx(other[name], rel=TOLERANCE), (one["step"], name)
        assert one["drift"] == pytest.approx(other["drift"], rel=0.3, abs=1e-6), one["step"]
    last = found[-1]
    assert 0 < last["mfu"] < 1
    assert last["memory_gib"] > 0
    phases = [last[f"seconds/{phase}"] for phase in ("forward", "backward", "step")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) < 1.5 * last["seconds"], "times of CUDA events are those of the clock"
    facts = json.loads((tmp_path / "gpu" / "run.json").read_text())
    assert facts["peak_flops"] > 1e14, facts["peak_source"]
