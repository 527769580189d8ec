"""Law 8 on DeepSpeed's own files: what a ZeRO-3 engine held, consolidation gives back bit for bit, and it computes the same."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h3scale.checkpoint.checks.logits import LOGIT_TOLERANCE
from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.expected import stored_as
from h3scale.checkpoint.shards import ModelFolder
from h3scale.checkpoint.verify import verify
from h3scale.checkpoint.zero import open_deepspeed
from tests.distributed.shard_case import Case

pytestmark = pytest.mark.distributed

CASES = {
    case.name: case
    for case in (
        # name, world_size, stage, ep_size, num_experts (0: dense), precision. Three ranks divide nothing here, so they pad.
        Case("one-rank", 1, 3, 1, 4, "fp32", ("frozen",)),
        Case("ep2", 2, 3, 2, 4, "fp32", ("frozen",)),
        Case("ep2-bf16", 2, 3, 2, 4, "bf16", ("frozen",)),
        Case("dense", 2, 3, 0, 0, "fp32"),
        Case("ep2-edp2", 4, 3, 2, 4, "fp32", ("frozen",)),
        Case("padded", 3, 3, 1, 4, "fp32", ("frozen",)),
        Case("zero1-dense", 2, 1, 0, 0, "fp32"),
        Case("zero1-sums", 2, 1, 2, 4, "bf16", ("sums", "frozen")),
        Case("zero2-ep2", 2, 2, 2, 4, "bf16", ("frozen",)),
        Case("zero2-offload", 2, 2, 1, 4, "fp32", ("offload",)),
    )
}
WORLDS = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}  # and the ep_size of each
MATRIX = {
    case.name: case
    for world_size, ep_sizes in WORLDS.items()
    for stage in (1, 2, 3)
    for ep_size in (0, *ep_sizes)
    for precision in ("fp32", "bf16")
    for options in ((), ("frozen",), ("offload",), ("frozen", "offload"))
    for case in [
        Case(
            "-".join(map(str, (world_size, stage, ep_size, precision, *options))),
            world_size,
            stage,
            ep_size,
            4 if ep_size else 0,
            precision,
            options,
        )
    ]
} | {
    case.name: case
    for case in (
        Case("ep4", 4, 3, 4, 4, "fp32", ("frozen",)),
        Case("three-experts", 3, 3, 3, 3, "fp32", ("frozen",)),
        Case("padded-dense", 3, 3, 0, 0, "fp32"),
        Case("padded-zero2", 3, 2, 3, 3, "bf16"),
        Case("sums", 4, 1, 2, 4, "bf16", ("sums",)),
    )
}


def train(out: Path, cases: Iterable[Case]) -> Path:
    """Trains the cases two steps by DeepSpeed and saves: CASE/step-000002, CASE/truth.safetensors, CASE/start.safetensors."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.shard_models", str(out), *map(str, cases)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("sharded"), CASES.values())


@pytest.fixture(scope="module", params=CASES)
def case(request, sharded) -> str:
    return request.param


def check_weights(run: Path, case: Case, out: Path) -> ModelFolder:
    """Consolidates, and compares every tensor with what the engine held; gives what was written."""
    truth = load_file(run / "truth.safetensors")
    summary = consolidate(run, out)
    assert (summary.world_size, summary.ep_size) == (case.world_size, max(case.ep_size, 1))
    assert f"ZeRO-{case.stage}" in summary.kind
    written = ModelFolder(out)
    for name in written.files:
        stored, expert = stored_as(name, written.config["model_type"] if case.num_experts else None)
        held = truth[stored] if expert is None else truth[stored][expert]
        assert torch.equal(written.tensor(name).to(held.dtype), held), name  # bf16 engines keep an fp32 original
    return written


def test_consolidation_gives_back_what_the_engine_held_and_it_computes_the_same(case, sharded, tmp_path):
    written = check_weights(sharded / case, CASES[case], tmp_path / "out")
    assert verify(sharded / case, tmp_path / "out").errors == []
    report = verify(tmp_path / "out", sharded / case)
    assert report.num_equal_tensors == len(written.files)
    print(f"{case}: max abs logit difference {report.max_abs_difference:.1e}")
    assert report.max_abs_difference <= (LOGIT_TOLERANCE if CASES[case].precision == "fp32" else 0.05)


def test_the_reader_knows_every_tensor_of_the_engine_and_no_other(case, sharded):
    truth = load_file(sharded / case / "truth.safetensors")
    zero = open_deepspeed(sharded / case / "step-000002" / "deepspeed")
    assert zero.specs.keys() == truth.keys()
    assert all(torch.equal(zero.tensor(name).to(held.dtype), held) for name, held in truth.items())
    assert zero.aliases["lm_head.weight"] == "model.embed_tokens.weight"


def test_the_cases_pad_train_and_freeze(sharded):
    """Else equality above could hold for reasons that prove nothing."""
    numel = {name: spec.num_bytes // 4 for name, spec in open_deepspeed(sharded / "padded/step-000002/deepspeed").specs.items()}
    assert any(count % CASES["padded"].world_size for count in numel.values())
    truth, start = (load_file(sharded / "padded" / f"{name}.safetensors") for name in ("truth", "start"))
    assert all(torch.equal(truth[name], start[name]) for name in truth if ".mlp." not in name)
    assert not torch.equal(truth["model.layers.0.mlp.router.gate.weight"], start["model.layers.0.mlp.gate.weight"])
    experts = truth["model.layers.0.mlp.experts.w1"]
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("case", ["ep2-bf16", "dense", "zero1-dense", "zero2-ep2"])
def test_a_universal_checkpoint_gives_the_same_model_frozen_weights_included(case, sharded, tmp_path):
    tag = sharded / case / "step-000002" / "deepspeed"
    command = ["--input_folder", tag, "--output_folder", tmp_path / "universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, command)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    consolidate(sharded / case, tmp_path / "direct")
    summary = consolidate(tmp_path / "universal", tmp_path / "out", config_from=tag.parent / "model")
    assert "universal" in summary.kind
    assert verify(tmp_path / "universal", tmp_path / "out", config_from=tag.parent / "model").errors == []
    # DeepSpeed 0.19.8 makes fp32 of bf16 values that are frozen: the same numbers
    direct, written = ModelFolder(tmp_path / "direct"), ModelFolder(tmp_path / "out")
    assert direct.files.keys() == written.files.keys()
    assert all(torch.equal(direct.tensor(name), written.tensor(name)) for name in direct.files)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", sorted({case.world_size for case in MATRIX.values()}))
def test_every_topology_stage_and_precision_comes_back_bit_for_bit(world_size, tmp_path):
    cases = [case for case in MATRIX.values() if case.world_size == world_size]
    train(tmp_path, cases)
    for case in cases:
        check_weights(tmp_path / case.name, case, tmp_path / f"{case.name}-out")
