"""A signal to the launcher of a node: the ranks save and end, none of them is left, and the same command goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from h3scale.exit_status import kept_step, read_exit_status, run_folder_of
from h3scale.launch.local import free_port
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = pytest.mark.distributed

STEPS = 100_000  # nobody waits for the end
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT", "--module", "h3scale.train"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT", "-m", "h3scale.train"],
    "h3scale train": ["h3scale", "train"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), EXPERTS)


@pytest.mark.parametrize(
    ("launcher", "number", "reason"),
    [
        ("deepspeed", signal.SIGTERM, "the launcher is gone"),  # SIGTERM ends it alone
        pytest.param("torchrun", signal.SIGTERM, "SIGTERM", marks=pytest.mark.slow),
        pytest.param("torchrun", signal.SIGKILL, "the launcher is gone", marks=pytest.mark.slow),
        pytest.param("h3scale train", signal.SIGKILL, "the launcher is gone", marks=pytest.mark.slow),
        ("h3scale train", signal.SIGUSR2, "SIGUSR2"),
    ],
)
def test_a_launcher_that_is_ended_leaves_a_saved_run_and_no_ranks(world: Path, launcher: str, number: int, reason: str) -> None:
    out = world / f"{launcher} {number}"
    program, *options = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
    words = [str(world / "recipe.yaml"), f"out={out}", f"steps={STEPS}", "ranks=2", "ep_size=2", "optimizer.schedule=constant"]
    command = [str(Path(sys.executable).with_name(program)), *options, *words]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (world / f"{launcher} {number}.log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(lambda: (run_folder_of(out) / "metrics.jsonl").is_file(), started)
        family = psutil.Process(started.pid).children(recursive=True)
        started.send_signal(number)
        started.wait(60)
        _, alive = psutil.wait_procs(family, timeout=60)
        said = Path(log.name).read_text()
        assert alive == [], said
    finally:
        for process in [*psutil.Process().children(recursive=True)]:
            process.kill()
    status = read_exit_status(out)
    assert status is not None, said
    assert status["exit_code"] == 75
    assert status["reason"].startswith(reason), said
    assert status["step"] == kept_step(out) > 0
    assert len((run_folder_of(out) / "metrics.jsonl").read_text().splitlines()) == status["step"]
    assert json.loads((run_folder_of(out) / f"step-{status['step']:06d}" / "manifest.json").read_text())["step"] == status["step"]
    if launcher == "h3scale train" and number == signal.SIGUSR2:
        assert started.returncode == 75


def test_the_multi_node_launcher_trains_over_a_hostfile(world: Path) -> None:
    hosts, out = world / "hosts", world / "two nodes"
    words = [str(world / "recipe.yaml"), f"out={out}", "ep_size=2", "steps=2"]
    bin_folder = Path(sys.executable).parent
    launch = [str(bin_folder / "h3scale"), "launch", *words, "--hostfile", str(hosts), "--node", "n0", "--node", "n1"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    said = subprocess.run([*launch, "--gpus-per-node", "1"], env=environment, capture_output=True, text=True, check=True).stdout
    program, *rest = shlex.split(said.splitlines()[0])
    # ssh is what carries the command to the nodes; DeepSpeed's own way without it takes the same hostfile and words
    alone = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--node_rank"]
    nodes = [
        subprocess.Popen([str(bin_folder / program), *alone, str(rank), *rest], env=environment, stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    assert [node.wait(180) for node in nodes] == [0, 0]
    assert json.loads((out / "step-000002" / "manifest.json").read_text())["world_size"] == 2


def wait_for(there: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, "ended before its first step"
        assert time.monotonic() < deadline
        time.sleep(0.1)
