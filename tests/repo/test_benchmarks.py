"""The benchmarks work: a run of seconds, its table and the fields of its JSON. What they find is in benchmarks/results."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SUBJECTS = {"waste", "shares", "packed_tokens_per_s", "prepare", "prepare_at_scale", "planner", "memory", "resume"}
FIGURES = {
    "waste": {"row_tokens", "waste", "cut"},
    "shares": {"rows_per_batch", "batches", "equal_mean", "equal_p95", "own_mean", "own_p95"},
    "packed_tokens_per_s": {"row_tokens", "tokens", "tokens_per_cpu_s", "tokens_per_wall_s", "ours_is_faster", "cpu_s_median"},
    "prepare": {"tokens", "tokens_per_cpu_s", "ratio", "ratio_of_medians", "cpu_s_min", "wall_s_median"},
    "prepare_at_scale": {"records", "tokens", "tokens_per_wall_s", "ratio", "cpu_ratio", "wall_s_min"},
    "planner": {"row_tokens", "records_per_cpu_s", "waste", "cpu_s_min", "cpu_s_median"},
    "memory": {"records", "seconds", "parent_anon_mib", "parent_rss_mib", "worker_anon_mib", "worker_rss_mib"},
    "resume": {"records", "seconds_min", "seconds_median", "open_s", "plan_s", "batch_s"},
}
PEERS = {"waste": "TRL", "shares": "TRL", "packed_tokens_per_s": "TRL", "planner": "TRL"}


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/data.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "data.json"
    done = benchmark("--tiny", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n{name}  (" in done.stdout for name in SUBJECTS)
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_every_subject_has_its_figures_and_what_they_depend_on(tiny: dict[str, Any]) -> None:
    assert set(tiny["subjects"]) == SUBJECTS
    for name, subject in tiny["subjects"].items():
        for row in subject["rows"]:
            assert "not_run" in row or FIGURES[name] <= set(row), (name, row)
        assert any("not_run" not in row for row in subject["rows"])
    assert {"cpu", "isa", "cores", "load_average", "load_average_at_end"} <= set(tiny["machine"])
    assert {"python", "torch", "numpy", "datasets", "tokenizers", "transformers", "trl", "h3scale"} <= set(tiny["versions"])
    assert tiny["corpus"]["tokens"] > 0
    assert tiny["command"].startswith("python benchmarks/data.py --tiny")
    assert "/" not in tiny["command"].removeprefix("python benchmarks/data.py")


def test_a_peer_that_is_not_installed_is_named(tiny: dict[str, Any]) -> None:
    for name, peer in PEERS.items():
        rows = [row for row in tiny["subjects"][name]["rows"] if peer in row["what"]]
        assert rows
        assert all(row.get("not_run") == "not installed" for row in rows) is (find_spec("trl") is None)


def test_a_subject_that_does_not_exist_is_refused() -> None:
    done = benchmark("--only", "speed")
    assert done.returncode == 2
    assert "'speed' is no subject (works: waste" in done.stderr


def test_results_hold_the_command_the_commit_and_no_path() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        assert {"command", "machine", "versions", "subjects"} <= set(result), path.name
        assert result["versions"]["h3scale"] != "unknown", path.name
