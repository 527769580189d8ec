"""The wheel alone, in an empty environment, runs the whole way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.distributed
def test_the_wheel_in_an_empty_environment_runs_the_quick_demo(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("h3scale-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    torch = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    run(*pip, *index, torch, cwd=tmp_path)
    run(*pip, wheel, cwd=tmp_path)
    said = run(
        tmp_path / "env" / "bin" / "h3scale",
        "demo",
        "--quick",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
        PYTHONPATH="",
        PATH="/usr/bin:/bin",
    )
    assert "result: " in said
    assert "next: " in said
    for name in ("report.html", "results.json", "release/README.md", "models/fused/model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_seed_gives_the_same_results_twice(tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        run(sys.executable, "-m", "h3scale.cli.main", "demo", "--quick", "--out", tmp_path / name, cwd=tmp_path)
        results.append((tmp_path / name / "results.json").read_bytes())
    assert results[0] == results[1]
