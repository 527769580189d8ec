"""What submits jobs, on a real Slurm: `h3scale launch` and slurm/pipeline.sh."""

import json
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from tests.slurm.jobs import SCRIPTS, Jobs

pytestmark = [pytest.mark.distributed, pytest.mark.slurm]


def launch(jobs: Jobs, *words: object) -> str:
    command = (sys.executable, "-m", "h3scale.cli.main", "launch", *words)
    return jobs.cluster.call(*command, cwd=jobs.folder).stdout.strip()


def test_launch_prints_the_command_that_it_submits(jobs: Jobs, world: Path) -> None:
    words = (world / "recipe.yaml", "out=run", "ranks=1", "steps=1", "--nodes=2", "--sbatch=--hold", "--sbatch=--parsable")
    (printed,) = launch(jobs, *words, "--print").splitlines()
    command = shlex.split(printed.removeprefix("slurm:"))
    by_hand = jobs.submit(*command[1:])
    submitted = launch(jobs, *words, "--submit")
    jobs.numbers.append(submitted)
    same = ("Command", "NumNodes", "NumTasks", "NtasksPerN:B:S:C", "Requeue", "WorkDir", "JobName")
    first, second = ({key: jobs.cluster.job(number)[key] for key in same} for number in (by_hand, submitted))
    assert first == second
    assert (first["NumNodes"], first["NumTasks"], first["Requeue"]) == ("2-2", "2", "1")


def test_what_slurm_refuses_is_one_line(jobs: Jobs, world: Path) -> None:
    command = (sys.executable, "-m", "h3scale.cli.main", "launch", world / "recipe.yaml", "--submit", "--sbatch=--partition=none")
    done = jobs.cluster.call(*command, cwd=jobs.folder, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: sbatch: ")
    assert done.stderr.count("\n") == 1


def test_a_hostfile_has_the_nodes_of_the_allocation(jobs: Jobs, world: Path) -> None:
    words = [sys.executable, "-m", "h3scale.cli.main", "launch", world / "recipe.yaml", "--hostfile=hosts", "--gpus-per-node=4"]
    inside = jobs.submit("--nodes=2", "--ntasks-per-node=1", "--output=said", "--wrap", shlex.join(map(str, words)))
    assert jobs.ended(inside)["JobState"] == "COMPLETED", (jobs.folder / "said").read_text()
    nodes = jobs.nodes(inside)
    assert (jobs.folder / "hosts").read_text() == "".join(f"{node} slots=4\n" for node in nodes)


def test_the_pipeline_goes_the_whole_way_at_tiny_size(jobs: Jobs) -> None:
    heldout = Path(str(files("h3scale"))) / "data" / "records_builtin" / "heldout.jsonl"
    few = jobs.folder / "heldout.jsonl"
    lines = heldout.read_text().splitlines()
    few.write_text("\n".join(lines[:: max(1, len(lines) // 12)]) + "\n")
    words = (few, "all", "model=tiny", "align.steps=1", "train.steps=2")
    said = jobs.cluster.call(SCRIPTS / "pipeline.sh", "recipes/llama31_8b", *words, cwd=jobs.folder).stdout
    numbers = {line.split()[1]: line.split()[0] for line in said.splitlines()}
    jobs.numbers += numbers.values()
    assert list(numbers)[-4:] == ["fuse", "train", "consolidate_fused", "evaluate"]
    found = jobs.ended(numbers["evaluate"], limit_s=500)
    logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(jobs.folder.rglob("*.log")))
    assert found["JobState"] == "COMPLETED", f"{said}\n{logs}"
    for name in ("helpful", "harmless", "honest", "fused_init", "fused"):
        assert json.loads((jobs.folder / "all" / "evaluation" / f"{name}.json").read_text())["nll"]
    again = jobs.cluster.call(SCRIPTS / "pipeline.sh", "recipes/llama31_8b", *words, cwd=jobs.folder).stdout
    assert again == "everything is there already\n"


def test_what_waits_for_a_job_that_failed_is_taken_out_of_the_queue(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "env.sh").write_text("[[ -z ${SLURM_JOB_ID:-} ]] || python=(false)\n")
    (tmp_path / "heldout.jsonl").touch()
    words = ("recipes/llama31_8b", "heldout.jsonl", "all", "model=tiny")
    said = jobs.cluster.call(SCRIPTS / "pipeline.sh", *words, cwd=jobs.folder).stdout
    numbers = {line.split()[1]: line.split()[0] for line in said.splitlines()}
    assert jobs.ended(numbers["align_helpful"])["ExitCode"] == "1:0"
    assert {jobs.ended(number)["JobState"] for number in numbers.values()} == {"FAILED", "CANCELLED"}
