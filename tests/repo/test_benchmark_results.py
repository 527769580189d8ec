"""What is committed of benchmarks: which code it is of, and tables that are made from it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repo.benchmarking import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of its own with the benchmarks; h3scale itself is imported from here."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "h3scale").mkdir()
    (tmp_path / "h3scale" / "code.py").write_text("ONE = 1\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)
    return tmp_path


def commit_of(folder: Path, **environment: str) -> str:
    """As a result in this folder says it."""
    words = [sys.executable, "-c", "import measure; print(measure.versions(())['h3scale'])"]
    known = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), **environment}
    return subprocess.run(words, cwd=folder / "benchmarks", capture_output=True, text=True, check=True, env=known).stdout.strip()


CHANGED = ["h3scale/code.py", "h3scale/new.py", "benchmarks/moe_peers.py", "benchmarks/new.py"]


def test_a_result_says_whether_the_code_or_the_benchmarks_differ_from_their_commit(checkout: Path) -> None:
    clean = commit_of(checkout)
    assert len(clean) == 40
    for name in ("benchmarks/results/moe_layer.json", "benchmarks/results/new.json", "benchmarks/README.md", "README.md"):
        with (checkout / name).open("a") as file:  # what runs write
            file.write("\n")
        assert commit_of(checkout) == clean, name
    for name in CHANGED:
        path = checkout / name
        before = path.read_text() if path.exists() else None
        path.write_text((before or "") + "# one line\n")
        assert commit_of(checkout) == f"{clean}+", name
        path.unlink() if before is None else path.write_text(before)
    assert commit_of(checkout, BENCHMARK_COMMIT="another") == clean
    shutil.rmtree(checkout / ".git")
    assert commit_of(checkout) == "unknown"
    assert commit_of(checkout, BENCHMARK_COMMIT="its commit") == "its commit"


def test_a_result_of_a_tree_that_differs_from_its_commit_is_refused(checkout: Path) -> None:
    with (checkout / "benchmarks" / "moe_speed.py").open("a") as file:
        file.write("# one line\n")
    command = [sys.executable, "benchmarks/moe_layer.py", "--tiny", "--only", "ceilings", "--out", "result.json"]
    words: Any = {"cwd": checkout, "capture_output": True, "text": True, "check": False}
    words["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, **words)
    assert done.returncode == 2
    assert "differs from its commit (commit it, or --dirty)" in done.stderr
    assert not (checkout / "result.json").exists()
    subprocess.run(["git", "checkout", "--quiet", "benchmarks"], cwd=checkout, check=True)
    assert subprocess.run(command, **words).returncode == 0
    assert (checkout / "result.json").exists()


def test_results_hold_the_command_the_commit_and_no_path() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        assert {"command", "machine", "versions", "subjects"} <= set(result), path.name
        assert result["versions"]["h3scale"] != "unknown", path.name
        assert not re.search(r"(?<![\w.}])/(home|root|tmp|work|usr|opt)/", path.read_text()), path.name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("benchmarks", "h3scale"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def tables(folder: Path) -> str:
    """What `python benchmarks/tables.py` says."""
    command = [sys.executable, "benchmarks/tables.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment).stdout


def test_the_tables_of_experts_and_steps_are_what_their_results_say(copy: Path) -> None:
    """In a copy: `python benchmarks/tables.py` leaves the README as it is, and a figure that was typed in does not stay."""
    readme = copy / "benchmarks" / "README.md"
    kept = readme.read_text()
    table = between(kept, "layer")
    readme.write_text(kept.replace(table, re.sub(r"\*\*\d", "**9", table, count=1)))
    assert readme.read_text() != kept
    tables(copy)
    assert readme.read_text() == kept


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]


def test_tables_of_a_gpu_are_written_where_its_results_are_there(copy: Path) -> None:
    """As rows are on a GPU, with shares of the matrix product; those that are absent are named."""
    results, readme = copy / "benchmarks" / "results", copy / "benchmarks" / "README.md"
    for name in ("moe_layer_gpu.json", "train_step_gpu.json", "train_step.json"):
        (results / name).unlink(missing_ok=True)
    kept = readme.read_text()
    said = tables(copy)
    assert readme.read_text() == kept
    assert "layer_gpu: no 'layer' in results/moe_layer_gpu.json, left as it is" in said
    assert "step: no 'step' in results/train_step.json, left as it is" in said
    sizes = [{"experts": 3, "tokens": 4096, "dtype": "bf16", "load": "balanced", "inner": inner} for inner in (11008, 14336)]
    rows = [{"what": "h3scale in AutoEP", **size, "tflops": 640.0, "of_matmul": 0.81, "beside_dense": 1.1} for size in sizes]
    rows.append({"what": "MegaBlocks dMoE, grouped", **sizes[0], "not_run": "CUDA error"})
    write_subject(results / "moe_layer_gpu.json", "layer", rows)
    step = {"what": "h3scale", "tokens_per_s": 17000.0, "padding": "", "h3scale_is_faster": 1.0, "mfu": 0.48, "of_matmul": 0.6}
    write_subject(results / "train_step_gpu.json", "step", [step])
    said = tables(copy)
    assert "no 'layer'" not in said
    assert "loads_gpu: no 'loads' in results/moe_layer_gpu.json" in said
    text = readme.read_text()
    assert "3 experts, 4,096 tokens, 11,008 wide" in between(text, "layer_gpu")
    assert "| h3scale in AutoEP | **640 (81%)** | **640 (81%)** |" in between(text, "layer_gpu")
    assert "| h3scale | 17,000 | 1.00 | 48% | 60% |" in between(text, "step_gpu")
    assert between(text, "layer") == between(kept, "layer")


def write_subject(path: Path, subject: str, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"subjects": {subject: {"rows": rows}}}))
