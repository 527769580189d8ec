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


def scores_headline(findings: Findings) -> str:
    """Of a page that has nothing but a suite: how often the main model is better and worse, beyond chance."""
    name, told = shown_name(findings.main).capitalize(), _told(findings)
    if not told:
        return f"{name}: what it finds likely"
    return f"{name} is better in {told.count(True)} of {len(told)} comparisons, worse in {told.count(False)}"


def scores_lead(findings: Findings) -> str:
    """What was measured on what, below the headline."""
    suites = findings.suites
    first = next(iter(suites.values()))
    items = sum(len(entries) for entries in first["items"].values())
    measured = f"Suite {escape(first['suite'])}: {len(score_keys(suites))} scores on {items:,} items"
    if not _told(findings):
        return f"{measured}."
    return (
        f"{measured}, of {len(suites)} models. A comparison is a score of {shown_name(findings.main)} and of one other model on "
        "the same items; it counts where the 95% interval of the difference does not hold 0. Of differences that are none, one in "
        "twenty looks like one."
    )


def scores_notes(findings: Findings) -> list[str]:
    """What was cut or left out of a suite, once, with the models that it concerns."""
    suites = findings.suites
    found = dict.fromkeys(note for suite in suites.values() for note in suite["notes"])
    concerned = {note: [shown_name(name) for name, suite in suites.items() if note in suite["notes"]] for note in found}
    return [f"{', '.join(names)}: {escape(note)}" for note, names in concerned.items()]


def scores_section(findings: Findings, pictures: Mapping[str, Picture]) -> str:
    """Nothing without a suite."""
    if not findings.suites:
        return ""
    suite = next(iter(findings.suites.values()))["suite"]
    return section(
        "Scores without a judge",
        f"Suite {escape(suite)}: what each model finds likely, no text generated. Higher is better, but for NLL. Small: 95% "
        "interval, bootstrapped of NLL, Wilson's of shares; items with the same prompt count as one. "
        f"▲ ▼: {shown_name(findings.main)} is better or worse than this model on the same items, and the interval of the "
        "difference does not hold 0.",
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


def _told(findings: Findings) -> list[bool | None]:
    """Of each difference to another model whether it is better (None: these items do not tell)."""
    paired = findings.suites.get(findings.main, {}).get("paired", {})
    return [one["better"] for differences in paired.values() for one in differences]


def _verdict(findings: Findings, other: str, key: Key) -> str:
    """How the main model compares with another one on a score."""
    differences = findings.suites.get(findings.main, {}).get("paired", {}).get(other, [])
    found = next((one for one in differences if (one["task"], one["metric"], one["alignment"]) == key), None)
    return SIGNS[found["better"]] if found else ""
