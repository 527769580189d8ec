"""`sbatch slurm/train.sh` on a real Slurm: to its end, and the ways in which a job ends early."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from h3scale.launch.after import MAX_RESTARTS
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import Jobs

pytestmark = [pytest.mark.distributed, pytest.mark.slurm]

EXACT = ("step", "lm", "router", "drift", "grad_norm", "lr")  # of a step's line: what does not depend on the clock
STEPS, EVERY = 80, 10
SLOW_STEPS = 120  # of four times the rows: about a minute on two cores
LONG = (f"steps={STEPS}", f"save={{every: {EVERY}, keep: 2}}")
RANK_IS_KILLED_AT_ONCE = """#!/bin/bash
if [[ $* == *h3scale.train* && $RANK == 1 ]]; then kill -KILL $$; fi
exec {python} "$@"
"""
OTHER_VERSION_ON_N1 = """#!/bin/bash
if [[ $SLURMD_NODENAME == n1 ]]; then export PYTHONPATH={other}:$PYTHONPATH; fi
exec {python} "$@"
"""


def python_is(jobs: Jobs, script: str, **words: object) -> None:
    """Makes the cluster's Python, for jobs of this test, a script."""
    program = jobs.folder / "python"
    program.write_text(script.format(python=sys.executable, **words))
    program.chmod(0o755)
    (jobs.folder / "slurm").mkdir()
    (jobs.folder / "slurm" / "env.sh").write_text(f"python=({program})\n")


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in EXACT} for line in lines]


def wait_for_step(jobs: Jobs, number: str, step: int) -> None:
    """Until the run has done so many steps; the job's words when it ends before."""
    metrics = jobs.folder / ".run-run" / "metrics.jsonl"

    def reached() -> bool:
        state = jobs.cluster.job(number)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}\n{jobs.all_said(number)}"
        return metrics.exists() and len(metrics.read_text().splitlines()) >= step

    wait_for(f"step {step}", reached, limit_s=180)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The lines of the long run, when nothing happens to it."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"))
    number = jobs.train(world / "recipe.yaml", "out=run", *LONG)
    assert jobs.ended(number)["JobState"] == "COMPLETED", jobs.all_said(number)
    return lines_of(jobs.folder / "run")


def test_a_job_on_two_nodes_trains_to_its_end(jobs: Jobs, world: Path) -> None:
    number = jobs.train(world / "recipe.yaml", "out=run")
    assert jobs.ended(number)["JobState"] == "COMPLETED", jobs.all_said(number)
    assert [line["step"] for line in lines_of(jobs.folder / "run")] == [1, 2, 3, 4]
    assert json.loads((jobs.folder / "run" / "run.json").read_text())["ranks"] == 2
    assert "result: run" in jobs.ranks_log(number)
    assert "result: run" in jobs.log(number)
    assert not list(jobs.folder.glob(".preflight-*"))


def test_a_recipe_with_a_mistake_ends_the_job_with_its_line_and_code(jobs: Jobs, world: Path) -> None:
    number = jobs.train(world / "recipe.yaml", "out=run", "stpes=3")
    found = jobs.ended(number)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "78:0", "0")
    assert jobs.log(number).count("stpes: unknown key (did you mean 'steps'?)") == 2, "preflight and the verdict, once each"


def test_a_node_with_another_version_is_named_before_the_ranks_start(jobs: Jobs, world: Path) -> None:
    info = jobs.folder / "other" / "transformers-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    python_is(jobs, OTHER_VERSION_ON_N1, other=info.parent)
    number = jobs.train(world / "recipe.yaml", "out=run", options=("--nodelist=n0,n1",))
    found = jobs.ended(number)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "78:0", "0"), jobs.all_said(number)
    assert "error: preflight: n1: versions: transformers is 9.9.9, on n0 " in jobs.log(number)
    assert not jobs.ranks_log(number)


def test_a_cancelled_job_stays_cancelled(jobs: Jobs, world: Path) -> None:
    number = jobs.train(world / "recipe.yaml", "out=run", "steps=1000")
    wait_for_step(jobs, number, 2)
    jobs.cluster.call("scancel", number)
    assert jobs.ended(number)["JobState"] == "CANCELLED"
    assert jobs.cluster.job(number)["Restarts"] == "0"
    assert f"job {number}: Slurm takes it away" in jobs.log(number)
    assert not jobs.cluster.call("squeue", "--noheader").stdout.strip()


@pytest.mark.slow
def test_a_job_that_fails_again_and_again_is_given_up_with_its_code(jobs: Jobs, world: Path) -> None:
    python_is(jobs, RANK_IS_KILLED_AT_ONCE)
    number = jobs.train(world / "recipe.yaml", "out=run")
    found = jobs.ended(number)
    said = jobs.log(number)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "69:0", str(MAX_RESTARTS)), said
    assert said.count("(exit code 69): requeued, begins anew") == MAX_RESTARTS
    assert f"not requeued, as {MAX_RESTARTS} restarts have brought no new step" in said
    assert not list(jobs.folder.glob(".run-*")), "the count of restarts is over"


def requeued(jobs: Jobs, world: Path, disturb: Callable[[str], object]) -> str:
    """A long run that is disturbed in the middle and yet ends; the job's number."""
    number = jobs.train(world / "recipe.yaml", "out=run", *LONG)
    wait_for_step(jobs, number, EVERY + 5)
    disturb(number)
    restarted(jobs, number)
    found = jobs.ended(number)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), jobs.all_said(number)
    return number


def restarted(jobs: Jobs, number: str) -> None:
    """Waits until the job runs again: on its way back into the queue it looks as if it had ended (NODE_FAIL, PREEMPTED)."""
    wait_for("a restart", lambda: jobs.cluster.job(number)["Restarts"] != "0", limit_s=180)
    jobs.cluster.wait_for_state(number, "RUNNING", limit_s=60)


class TestGoesOn:
    """What ends a job early and lets it go on: its losses are those of one that nothing has happened to, bit for bit."""

    def test_after_usr2(self, jobs: Jobs, world: Path, undisturbed: list[dict[str, float]]) -> None:
        number = requeued(jobs, world, lambda job: jobs.cluster.call("scancel", "--signal=USR2", "--batch", job))
        assert lines_of(jobs.folder / "run") == undisturbed
        assert "(exit code 75): requeued, goes on at step" in jobs.log(number)

    @pytest.mark.slow
    def test_after_the_time_limit(self, jobs: Jobs, world: Path) -> None:
        """Slurm looks every 30 s and counts in minutes: the signal comes in second 20 to 50, and more rows a step outlast that."""
        words = (*LONG, f"steps={SLOW_STEPS}", "data.rows_per_batch=32")
        number = jobs.train(world / "recipe.yaml", "out=run", *words, options=("--time=1", "--signal=B:USR2@10"))
        restarted(jobs, number)
        jobs.cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # once is enough
        found = jobs.ended(number)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), jobs.all_said(number)
        assert [line["step"] for line in lines_of(jobs.folder / "run")] == list(range(1, SLOW_STEPS + 1))
        assert "SIGUSR2" in jobs.log(number)

    def test_after_a_job_that_is_more_urgent(self, jobs: Jobs, world: Path, undisturbed: list[dict[str, float]]) -> None:
        urgent = jobs.folder / "urgent.sh"
        urgent.write_text("#!/bin/bash\nsleep 2\n")
        requeued(jobs, world, lambda _: jobs.submit("--partition=urgent", "--nodes=4", "--exclusive", urgent))
        assert lines_of(jobs.folder / "run") == undisturbed

    def test_after_a_rank_was_killed(self, jobs: Jobs, world: Path, undisturbed: list[dict[str, float]]) -> None:
        def kill(_: str) -> None:
            (rank,) = [p for p in jobs.cluster.processes() if p.environ().get("RANK") == "1"]
            rank.kill()

        number = requeued(jobs, world, kill)
        assert lines_of(jobs.folder / "run") == undisturbed
        assert "(exit code 69): requeued, goes on at step" in jobs.log(number)

    @pytest.mark.slow
    def test_after_a_node_has_died(self, jobs: Jobs, world: Path, undisturbed: list[dict[str, float]]) -> None:
        dead = []

        def kill(number: str) -> None:
            dead.append(jobs.nodes(number)[-1])  # not the one that the script runs on
            jobs.cluster.kill_node(dead[0])

        try:
            number = requeued(jobs, world, kill)
            assert dead[0] not in jobs.nodes(number)
        finally:
            for name in dead:
                jobs.cluster.start_node(name)
        assert lines_of(jobs.folder / "run") == undisturbed

    @pytest.mark.slow
    def test_not_after_a_stop_file_until_it_is_asked_again(
        self, jobs: Jobs, world: Path, undisturbed: list[dict[str, float]]
    ) -> None:
        number = jobs.train(world / "recipe.yaml", "out=run", *LONG)
        wait_for_step(jobs, number, 5)
        (jobs.folder / ".run-run" / "STOP").touch()
        found = jobs.ended(number)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), jobs.all_said(number)
        assert "run: a file STOP, step" in jobs.log(number)
        again = jobs.train(world / "recipe.yaml", "out=run", *LONG)
        assert jobs.ended(again)["JobState"] == "COMPLETED", jobs.all_said(again)
        assert lines_of(jobs.folder / "run") == undisturbed
