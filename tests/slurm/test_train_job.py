"""`sbatch slurm/train.sh` on a real Slurm: to its end, and the ways in which a job ends early."""

import json
from pathlib import Path

import pytest

from tests.slurm.jobs import Jobs

pytestmark = [pytest.mark.distributed, pytest.mark.slurm]


def test_a_job_on_two_nodes_trains_to_its_end(jobs: Jobs, world: Path) -> None:
    number = jobs.train(world / "recipe.yaml", "out=run")
    assert jobs.ended(number)["JobState"] == "COMPLETED", jobs.all_said(number)
    lines = (jobs.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    facts = json.loads((jobs.folder / "run" / "run.json").read_text())
    assert facts["ranks"] == 2
    assert "result: run" in jobs.ranks_log(number)
