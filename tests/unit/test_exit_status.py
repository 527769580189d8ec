"""How a run ended, in a file: of this attempt, whole or not there."""

import json
from pathlib import Path

import pytest

from h3scale.exit_status import ended_before, kept_step, read_exit_status, run_folder_of, write_exit_status


def test_a_run_that_did_not_end_well_says_so_in_its_own_folder_and_one_that_did_in_its_output(tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert run_folder_of(out) == tmp_path / ".run-x"
    assert read_exit_status(out) is None
    run_folder_of(out).mkdir()
    write_exit_status(run_folder_of(out), 75, "SIGUSR2 on rank 3", 120, 1000)
    expected = {"exit_code": 75, "reason": "SIGUSR2 on rank 3", "step": 120, "steps": 1000, "job": None, "restart": 0}
    assert read_exit_status(out) == expected
    run_folder_of(out).rename(out)
    assert read_exit_status(out) == expected
    assert [path.name for path in out.iterdir()] == ["exit_status.json"]


def test_what_an_output_that_is_to_be_replaced_says_is_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.mkdir()
    write_exit_status(out, 0, "done", 10, 10)
    assert read_exit_status(out) is not None
    run_folder_of(out).mkdir()
    assert read_exit_status(out) is None


def test_that_of_another_job_or_restart_says_nothing_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_exit_status(tmp_path, 75, "SIGUSR2 on rank 0", 5, 10)
    assert read_exit_status(tmp_path) is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert read_exit_status(tmp_path) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert read_exit_status(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"job": null, "restart": 0}', '{"exit_code": 0, "job": null, "restart": 0}'])
def test_a_broken_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit_status.json").write_text(text)
    assert read_exit_status(tmp_path) is None


def test_the_newest_step_that_is_kept_has_a_manifest(tmp_path: Path) -> None:
    assert kept_step(tmp_path / "x") == 0
    for name in ("step-000100", "step-000090", "resume-000095", "step-000099.old", ".damaged-step-000099"):
        (tmp_path / ".run-x" / name).mkdir(parents=True)
    for name in ("step-000090", "resume-000095", "step-000099.old", ".damaged-step-000099"):
        (tmp_path / ".run-x" / name / "manifest.json").write_text(json.dumps({}))
    assert kept_step(tmp_path / "x") == 95


def test_a_job_that_slurm_starts_again_after_it_was_done_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x"
    out.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_exit_status(out, 0, "done", 10, 10)
    assert not ended_before(out)  # this start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ended_before(out)
    run_folder_of(out).mkdir()  # a run that is to replace it
    assert not ended_before(out)
    run_folder_of(out).rmdir()
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert not ended_before(out)
