"""What becomes of a Slurm job: by the run's own word, else by srun's code; not for ever."""

import json
from pathlib import Path
from typing import Any

import pytest

from h3scale.launch.after import MAX_RESTARTS, judge


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")


def status(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"exit_code": 75, "reason": "SIGUSR2 on rank 3", "step": 120, "steps": 1000, "job": "17", "restart": 2}
    (folder / "exit_status.json").write_text(json.dumps(known | values))


def step(folder: Path, number: int) -> None:
    (folder / f"step-{number:06d}").mkdir(parents=True)
    (folder / f"step-{number:06d}" / "manifest.json").write_text("{}")


def test_the_runs_own_word_goes_over_sruns_code(tmp_path: Path) -> None:
    status(tmp_path / ".run-x")
    step(tmp_path / ".run-x", 120)
    found = judge(tmp_path / "x", 143)
    assert (found.requeue, found.code) == (True, 75)
    assert "SIGUSR2 on rank 3, step 120 of 1000 (exit code 75): requeued, goes on at step 120" in found.line


def test_a_run_that_has_ended_well_is_not_requeued_whatever_srun_says(tmp_path: Path) -> None:
    status(tmp_path / "x", exit_code=0, reason="done")
    assert (judge(tmp_path / "x", 137).requeue, judge(tmp_path / "x", 137).code) == (False, 0)


@pytest.mark.parametrize("other", [{"job": "16"}, {"restart": 1}, {"job": None}])
def test_a_word_of_another_job_or_start_says_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    status(tmp_path / ".run-x", **other)
    found = judge(tmp_path / "x", 78)
    assert (found.requeue, found.code) == (False, 78)


@pytest.mark.parametrize(("srun", "code", "requeue"), [(137, 69, True), (140, 69, True), (69, 69, True), (75, 75, True)])
def test_a_rank_that_was_killed_counts_as_a_lost_peer(tmp_path: Path, srun: int, code: int, requeue: bool) -> None:
    found = judge(tmp_path / "x", srun)
    assert (found.requeue, found.code) == (requeue, code)


@pytest.mark.parametrize("code", [0, 1, 2, 65, 66, 70, 73, 74, 76, 77, 78])
def test_nothing_else_is_requeued(tmp_path: Path, code: int) -> None:
    found = judge(tmp_path / "x", code)
    assert (found.requeue, found.code) == (False, code)
    assert not list(tmp_path.iterdir())


def test_restarts_without_a_new_step_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / ".run-x"
    found = [judge(tmp_path / "x", 69) for _ in range(MAX_RESTARTS)]
    assert all(verdict.requeue for verdict in found)
    step(run, 5)
    found = [judge(tmp_path / "x", 69) for _ in range(MAX_RESTARTS + 1)]
    assert [verdict.requeue for verdict in found] == [True] * MAX_RESTARTS + [False]
    assert found[-1].code == 69
    assert f"as {MAX_RESTARTS} restarts have brought no new step" in found[-1].line
    assert judge(tmp_path / "x", 69).requeue, "who submits it again begins to count anew"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert judge(tmp_path / "x", 69).requeue
