"""A rank that does not answer: the others say so in time, also when they wait for it in an expert-parallel group."""

import time
from pathlib import Path

import pytest

from h3scale.exit_status import read_exit_status
from h3scale.launch import local
from h3scale.launch.local import rank_command, run_ranks
from h3scale.train.peers import SHARE
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = pytest.mark.distributed

TIMEOUT_S = 6
STARTING_S = 120  # far more than two ranks need to start; torch's own timeout is half an hour


def test_a_rank_that_stops_inside_the_experts_ends_the_run_within_the_timeout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 1)
    world = make_world(tmp_path / "world", EXPERTS)
    words = [str(world / "recipe.yaml"), f"out={tmp_path / 'run'}", "ep_size=2", f"collective_timeout_s={TIMEOUT_S}"]
    began = time.monotonic()
    assert run_ranks(rank_command("tests.distributed.stop_in_expert", words), 2) == 69
    assert time.monotonic() - began < STARTING_S
    assert "error: rank 0: rank 1 does not answer (" in capfd.readouterr().err
    status = read_exit_status(tmp_path / "run")
    assert status is not None
    assert (status["exit_code"], status["reason"].split(" (")[0]) == (69, "rank 0: rank 1 does not answer")
    stacks = (tmp_path / ".run-run" / "logs" / "rank-0.log").read_text()
    assert f"Timeout (0:00:{SHARE * TIMEOUT_S:04.1f}" in stacks  # of faulthandler, while the rank still waits
    assert "in all_to_all_single" in stacks.split("Timeout (")[1]
    assert not (tmp_path / "run").exists()
