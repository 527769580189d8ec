"""verify finds every fault that is planted, says what it is, and ends with the right code (law 10)."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.findings import Report, error
from h3scale.checkpoint.verify import examine
from h3scale.cli.checkpoint import app
from tests.unit.checkpoint.planted_faults import FOLDER, TRAINING

CODES = {"error": 65, "unsafe": 77}


@pytest.fixture(scope="module")
def sound(training, tmp_path_factory):
    """A model in several shards, with its receipt."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    consolidate(training, folder, max_shard_bytes=20_000)
    return folder


def _check(where, severity, words):
    report = examine(where)
    found = [finding for finding in report.findings if words in finding.text]
    assert [finding.severity for finding in found[:1]] == [severity], report.findings
    assert report.exit_code == max(CODES[finding.severity] for finding in report.findings if finding.severity in CODES)
    assert report.exit_code >= CODES[severity]
    assert not (where.parent / "witness").exists()


# each starts a process that imports transformers, some seconds; the others of their kind are tried in every run
SLOW = {
    "a template that is long",
    "a template that changes its input",
    "a template that includes",
    "a template that writes nothing",
}


@pytest.mark.parametrize("fault", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FOLDER])
def test_a_fault_in_a_model_folder_is_found(sound, tmp_path, fault):
    plant, severity, words = FOLDER[fault]
    shutil.copytree(sound, tmp_path / "model")
    plant(tmp_path / "model")
    _check(tmp_path / "model", severity, words)


@pytest.mark.parametrize("fault", TRAINING)
def test_a_fault_in_a_training_checkpoint_is_found(training, tmp_path, fault):
    plant, severity, words = TRAINING[fault]
    shutil.copytree(training, tmp_path / "step")
    plant(tmp_path / "step")
    _check(tmp_path / "step", severity, words)


def test_all_faults_of_a_folder_are_found_at_once(sound, tmp_path):
    planted = [FOLDER[fault] for fault in ("a NaN", "remote code", "a wrong dtype", "a bare pickle", "a special token outside")]
    shutil.copytree(sound, tmp_path / "model")
    for plant, _, _ in planted:
        plant(tmp_path / "model")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "model"), "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == report["exit_code"] == CODES["unsafe"]
    for _, severity, words in planted:
        assert [f["severity"] for f in report["findings"] if words in f["text"]] == [severity], (words, report["findings"])


def test_nothing_is_found_in_what_no_fault_was_planted_in(sound, training):
    assert examine(sound).findings == []
    assert examine(training).findings == []


def test_of_many_findings_of_one_kind_the_first_are_written_out_and_the_rest_is_counted():
    report = Report("model")
    report.run("index", lambda: (error(f"model: tensor {i}") for i in range(1000)))
    assert len(report.findings) < 100
    assert report.errors[-1] == f"model: ... and {1000 - len(report.findings) + 1} more like this"
