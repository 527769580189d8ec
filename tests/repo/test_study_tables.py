"""The tables of docs/study.md say what the committed seeds say."""

from typing import Any

import pytest

from h3scale.study.evidence import read_seeds
from h3scale.study.outcome import assemble
from h3scale.study.study_table import gain, with_interval
from tests.repo.benchmarking import ROOT


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return assemble(read_seeds(sorted((ROOT / "docs" / "study").glob("seed-*.json.gz"))))


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "study.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_every_row_of_a_model_is_its_result(results: dict[str, Any], rows: list[list[str]]) -> None:
    models = results["models"]
    told = {row[0]: row[1:] for row in rows if row[0] in models and len(row) == 6 + len(results["alignments"])}
    asked = {name for pair in results["comparisons"] for name in (pair["one"], pair["other"]) if not name.startswith("resm_")}
    assert {"base", "ensemble", *asked} <= told.keys()
    for name, cells in told.items():
        model, paired = models[name], models[name].get("paired", {})
        differences = [with_interval(paired[key], 4, "+") if paired else "" for key in ("mean_nll", "over_seeds")]
        gains = [gain(model["gain"][alignment]["mean"]) for alignment in results["alignments"]]
        balance = with_interval(model["balance"], 2)
        assert cells == [f"{model['mean_nll']['mean']:.4f}", *gains, balance, *differences, paired.get("verdict", "")], name


def test_every_row_of_two_models_is_their_difference(results: dict[str, Any], rows: list[list[str]]) -> None:
    told = {row[0]: row[1:] for row in rows if len(row) == 4 and " less " in row[0]}
    wanted = {
        f"{pair['one']} less {pair['other']}": [
            with_interval(pair["mean_nll"], 4, "+"),
            with_interval(pair["over_seeds"], 4, "+"),
            pair["verdict"],
        ]
        for pair in results["comparisons"]
    }
    assert told == wanted


def test_every_row_of_a_model_by_seed_is_its_mean_nll(results: dict[str, Any], rows: list[list[str]]) -> None:
    names = {"Iso-C, searched": "iso_c_searched", "task arithmetic, searched": "task_arithmetic_searched", "fused": "fused"}
    told = {names[row[0]]: row[1:4] for row in rows if row[0] in names and len(row) == 5}
    assert told.keys() == set(names.values())
    for name, cells in told.items():
        seeds = results["models"][name]["by_seed"].values()
        assert cells == [f"{sum(seed['nll'].values()) / len(seed['nll']):.4f}" for seed in seeds]
