"""The report's section on a suite: every model's scores as a picture and as a table, and the main model against each other."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from h3scale.evaluation.findings import Findings
from h3scale.evaluation.measures import HIGHER_IS_BETTER
from h3scale.evaluation.report_plots import Picture
from h3scale.evaluation.report_tables import bare_figure, dot, section, shown_name
from h3scale.evaluation.score_plots import METRICS, Key, score_at, score_keys, task_name

SIGNS = {True: "▲", False: "▼", None: ""}


def scores_section(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    """Nothing without a suite."""
    if not findings.suites:
        return ""
    suite = next(iter(findings.suites.values()))["suite"]
    return section(
        "Scores without a judge",
        f"Suite {escape(suite)}: what each model finds likely, no text generated. Higher is better, but for NLL. Small: 95% "
        f"bootstrap interval; items with the same prompt are drawn together. ▲ ▼: {shown_name(findings.main)} is better or worse "
        "than this model on the same items, and the interval of the difference does not hold 0.",
        f'<div class="wide">{bare_figure(pictures, "scores")}</div>' if "scores" in pictures else "",
        f'<div class="card scroll">{_table(findings)}</div>',
    )


def _table(findings: Findings) -> str:
    suites = findings.suites
    heads = "".join(f'<th scope="col">{shown_name(name)}</th>' for name in suites)
    body = []
    for key in score_keys(suites):
        scores = {name: score_at(suite, key) for name, suite in suites.items()}
        means = {score["mean"] for score in scores.values() if score}
        best = max(means) if HIGHER_IS_BETTER[key[1]] else min(means)
        cells = "".join(
            _cell(score, len(means) > 1 and score is not None and score["mean"] == best, _verdict(findings, name, key))
            for name, score in scores.items()
        )
        name = f"{dot(findings, key[2])}{escape(task_name(key))}<small>{METRICS[key[1]]}</small>"
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return f'<table style="--columns:{len(suites)}"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _cell(score: Mapping[str, Any] | None, is_best: bool, verdict: str) -> str:
    if score is None:
        return "<td></td>"
    interval = f"<small>{score['low']:.3f} to {score['high']:.3f}</small>"
    best = ' class="best"' if is_best else ""
    return f"<td{best}>{score['mean']:.3f} {verdict}{interval}</td>"


def _verdict(findings: Findings, other: str, key: Key) -> str:
    """How the main model compares with another one on a score."""
    differences = findings.suites.get(findings.main, {}).get("paired", {}).get(other, [])
    found = next((one for one in differences if (one["task"], one["metric"], one["alignment"]) == key), None)
    return SIGNS[found["better"]] if found else ""
