"""A kill, or a disk that refuses, at each system call of a save and of a run's end: nothing torn is ever seen, nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from h3scale.errors import OutputError, StorageError
from tests.distributed.test_resume import EXPERTS, lines, model, run_all, words
from tests.distributed.test_train import make_world
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        shutil.which("strace") is None and os.environ.get("CI") != "true", reason="strace is not installed (apt-get install strace)"
    ),
]

STEP = 3
STAGE, DENSE = "ZeRO-3, EP 2", "no ZeRO, LoRA"
SHARE = 0.15  # of the calls, in make test


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    tiny_llama(folder / "dense")
    return folder


def line(world: Path, stage: str, out: Path, *more: str) -> list[str]:
    """Of a run on one rank."""
    alone = ["ep_size=1"] if stage == STAGE else ["evaluation=null"]
    return words(world, stage, out, "save.every=1", *alone, *more)


def swept(asked: dict[str, Any]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.sweep", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert found
    return found


def end_bit_for_bit_alike(world: Path, stage: str, tmp_path: Path, samples: list[Path]) -> None:
    """The runs that are gone on with, and one that nothing happened to."""
    asked = {str(folder): ("", line(world, stage, folder / "x", "--force")) for folder in [tmp_path / "whole", *samples]}
    codes, said = run_all(asked, ranks=1)
    assert codes == {name: [0] for name in asked}, said
    expected = model(tmp_path / "whole" / "x", stage)
    for folder in samples:
        assert lines(folder / "x") == lines(tmp_path / "whole" / "x")
        found = model(folder / "x", stage)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], folder


@pytest.mark.parametrize("share", [SHARE, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [STAGE, pytest.param(DENSE, marks=pytest.mark.slow)])
def test_a_save_that_is_killed_or_refused_at_any_call_leaves_the_old_checkpoints_and_a_whole_new_one_or_none(
    world: Path, tmp_path: Path, stage: str, share: float
) -> None:
    out = tmp_path / "place" / "x"
    out.parent.mkdir()
    samples = tmp_path / "samples" if share == 1 else ""
    asked = {"words": line(world, stage, out), "of": "save", "step": STEP, "faults": ["KILL", "error"], "share": share}
    found = swept(asked | {"samples": str(samples)})
    assert {case["fault"] for case in found} == {"KILL", "error"}
    for case in found:
        ends = [case, *(end[2] for end in case["told"] or [])]
        for there in ends:
            assert there["wrong"] == [], case
            assert {STEP - 1} < {*there["steps"]} <= {STEP - 2, STEP - 1, STEP}, case  # save.keep: two at any moment
        assert case["code"] == (-9 if case["fault"] == "KILL" else 0), case
        for code, findings, there in case["told"] or []:
            assert code in (0, StorageError.exit_code), case
            assert (STEP in there["steps"]) is (code == 0), case
            assert not [name for name in there["names"] if name.startswith(".partial-")], case
            assert all(": cannot be written: " in finding for finding in findings), case
        assert case["told"] is None or case["told"][-1][0] == 0, case  # a disk that is as it was is written again
    kept = [Path(case["sample"]) for case in found if "sample" in case]
    if share == 1:
        assert kept
        end_bit_for_bit_alike(world, stage, tmp_path, kept)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [STAGE, DENSE])
def test_a_run_whose_end_is_killed_or_refused_at_any_call_leaves_the_old_output_or_the_new_one(
    world: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "place" / "x"
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    asked = {"words": line(world, stage, out, "--force"), "of": "finish", "faults": ["KILL", "error"], "share": 1.0}
    found = swept(asked | {"samples": str(tmp_path / "samples")})
    for case in found:
        assert case["wrong"] == [], case
        assert case["out"] == ["old.txt"] or {"run.json", "exit_status.json"} < {*case["out"]}, case
        for code, _, _ in case["told"] or []:
            assert code in (0, StorageError.exit_code, OutputError.exit_code), case
    end_bit_for_bit_alike(world, stage, tmp_path, [Path(case["sample"]) for case in found if "sample" in case])
