"""h3scale study --quick as a person runs it, killed on the way and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h3scale.config.study import load_study
from h3scale.study.plan import plan_study

pytestmark = pytest.mark.distributed

RECIPE = "recipes/study/builtin.yaml"


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "h3scale.cli.main", "study", RECIPE, "--quick", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_quick_study_compares_all_kinds_of_models_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "study"
    killed = start(out)
    while killed.poll() is None and not (out / "steps/seed-0.base.json").exists():
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGTERM)  # while the base is being trained, or begins to be
    said = killed.communicate()[0]
    assert killed.returncode not in (0, 70), said

    going_on = start(out)
    said = going_on.communicate()[0]
    assert going_on.returncode == 0, said
    assert said.count("there already") == 3, "records and tokenizer were made again"

    plan = plan_study(load_study(RECIPE, quick=True))
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == [model.name for model in plan.models]
    assert {model["group"] for model in results["models"].values()} == {
        "single",
        "mixture",
        "merge",
        "searched",
        "fusion",
        "ensemble",
    }
    assert all(model["by_seed"]["0"]["gain"].keys() == {"helpful", "harmless", "honest"} for model in results["models"].values())
    assert results["models"]["fused"]["parameters"]["total"] > results["models"]["fused"]["parameters"]["active"]
    assert results["models"]["fused"]["tokens"] == results["models"]["mixture_balanced"]["tokens"]
    assert json.loads((out / "seed-0/search/task_arithmetic_searched/search.json").read_text())["records"] == 4 * 3
    for name in results["models"]:
        assert f"| {name} |" in (out / "table.md").read_text().replace("**", "")
    assert "<svg" in (out / "study.html").read_text()

    again = start(out)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert said.count("there already") == len(plan.tasks)
