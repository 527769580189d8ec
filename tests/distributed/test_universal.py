"""A universal checkpoint of ours is one that DeepSpeed's own loader goes on from, with other ranks and another ep_size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.shards import ModelFolder
from h3scale.checkpoint.zero import open_deepspeed
from tests.distributed.shard_case import Case
from tests.distributed.test_consolidate import train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAVED = {
    "ep2": Case("ep2", 2, 3, 2, 4, "fp32", ("frozen",)),
    "ep1": Case("ep1", 2, 3, 1, 4, "fp32"),
    "zero2": Case("zero2", 2, 2, 2, 4, "fp32", ("frozen",)),
    "dense": Case("dense", 2, 3, 0, 0, "fp32"),
    "bf16": Case("bf16", 2, 3, 2, 4, "bf16", ("frozen",)),
    "sums": Case("sums", 2, 1, 2, 4, "bf16", ("sums", "frozen")),
}
LOADED = [
    ("ep2", Case("ep4", 4, 3, 4, 4, "fp32", ("frozen",))),
    ("ep2", Case("ep1-of-3", 3, 3, 1, 4, "fp32", ("frozen",))),
    ("ep1", Case("ep2", 2, 3, 2, 4, "fp32")),
    ("zero2", Case("zero2-ep1", 2, 2, 1, 4, "fp32", ("frozen",))),
    ("dense", Case("dense-1", 1, 3, 0, 0, "fp32")),
    ("bf16", Case("bf16-ep1", 2, 3, 1, 4, "bf16", ("frozen",))),
    ("sums", Case("sums-ep1", 2, 1, 1, 4, "bf16", ("sums", "frozen"))),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("saved"), SAVED.values())


def go_on(out: Path, model: Path, folder: Path, tag: str, how: str, case: Case) -> dict[str, dict[str, torch.Tensor]]:
    out.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.universal_models"]
    done = subprocess.run(
        [*command, *map(str, (out, model, folder, tag, how, case))],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "steps").read_text() == "3"  # two before the save
    return {name: load_file(out / f"{name}.safetensors") for name in ("loaded", "after")}


@pytest.mark.parametrize(("name", "case"), LOADED, ids=[f"{name}-as-{case.name}" for name, case in LOADED])
def test_deepspeed_goes_on_from_it_with_another_topology(saved, tmp_path, name, case):
    """The next step is that of the same ranks as before, which holds only when weights, moments and step all came back."""
    step = saved / name / "step-000002"
    consolidate(saved / name, tmp_path / "model")
    convert(saved / name, tmp_path / "universal", to="universal")
    truth = load_file(saved / name / "truth.safetensors")
    found = go_on(tmp_path / "other", tmp_path / "model", tmp_path, "universal", "universal", case)
    assert found["loaded"].keys() == truth.keys()
    assert all(torch.equal(found["loaded"][tensor], values) for tensor, values in truth.items())
    expected = go_on(tmp_path / "same", tmp_path / "model", step, "deepspeed", "plain", SAVED[name])["after"]
    moved = sum(not torch.equal(expected[tensor], truth[tensor]) for tensor in truth)
    assert moved >= sum(".mlp." in tensor for tensor in truth)
    rtol, atol = (1e-5, 1e-6) if case.precision == "fp32" else (0.02, 1e-3)
    for tensor, values in expected.items():
        torch.testing.assert_close(found["after"][tensor], values, rtol=rtol, atol=atol)


def test_it_holds_the_frozen_tensors_too(saved, tmp_path):
    convert(saved / "ep2", tmp_path / "universal", to="universal")
    consolidate(tmp_path / "universal", tmp_path / "out", config_from=saved / "ep2" / "step-000002" / "model")
    consolidate(saved / "ep2", tmp_path / "direct")
    direct, written = ModelFolder(tmp_path / "direct"), ModelFolder(tmp_path / "out")
    assert direct.files.keys() == written.files.keys()
    assert all(torch.equal(direct.tensor(tensor), written.tensor(tensor)) for tensor in direct.files)


@pytest.mark.parametrize("name", ["ep2", "ep1", "zero2", "dense"])
def test_it_has_all_that_deepspeeds_own_converter_gives(saved, tmp_path, name):
    tag = saved / name / "step-000002" / "deepspeed"
    command = [
        "--input_folder",
        tag,
        "--output_folder",
        tmp_path / "theirs",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            *map(str, command),
            "--inject_missing_state",
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    convert(saved / name, tmp_path / "ours", to="universal")
    aliases = open_deepspeed(tag).aliases
    files = [path for path in (tmp_path / "theirs" / "zero").glob("*/*.pt") if path.parent.name not in aliases]
    assert files
    for path in files:
        theirs, ours = (
            torch.load(each, weights_only=False) for each in (path, tmp_path / "ours" / path.relative_to(tmp_path / "theirs"))
        )
        if isinstance(theirs, dict):
            assert all(ours[key] == value for key, value in theirs.items() if key not in ("param", "vocab_tensor"))
            assert torch.equal(theirs["param"], ours["param"].to(theirs["param"].dtype)), path
        else:
            assert torch.equal(torch.as_tensor(theirs).flatten(), _values(ours).flatten()), path


def _values(saved_value) -> torch.Tensor:
    return torch.as_tensor(saved_value["param"] if isinstance(saved_value, dict) else saved_value)
