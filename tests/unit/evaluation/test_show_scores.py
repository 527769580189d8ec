"""A suite's scores on a terminal of eighty columns, of more models than fit beside each other."""

import io
from typing import Any

from rich.console import Console

from h3scale.cli.evaluate_scores import show_scores

MODELS = [f"mixture_of_alignments_{number}" for number in range(9)]
TASKS = ("truthfulqa", "hhh_harmless")


def score(task: str, mean: float) -> dict[str, Any]:
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    return {"task": task, "metric": "mc1", "alignment": "honest", **interval, "items": 30, "groups": 30}


def test_every_table_names_its_rows_and_models_in_full() -> None:
    results: dict[str, Any] = {
        name: {"suite": "3h", "scores": [score(task, 0.1 * number) for task in TASKS], "notes": []}
        for number, name in enumerate(MODELS)
    }
    difference = [{**score(task, 0.5), "better": True} for task in TASKS]
    results[MODELS[-1]]["paired"] = dict.fromkeys(MODELS[:-1], difference)
    said = io.StringIO()
    show_scores(Console(file=said, width=80), results)
    lines = said.getvalue().splitlines()
    heads = [line for line in lines if MODELS[0][:-1] in line and " minus " not in line]
    assert max(len(line) for line in lines if line in heads or "MC1" in line) <= 80
    for task in TASKS:
        assert sum(f"{task} (honest): MC1" in line for line in lines) == len(heads)
    text = " ".join(heads)
    assert [text.count(name) for name in MODELS] == [2] * (len(MODELS) - 1) + [1]
    assert sum("0.800" in line for line in lines) == len(TASKS), "the last model's mean stands once in each row"
