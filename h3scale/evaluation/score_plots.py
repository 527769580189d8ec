"""The picture of a suite: a small panel a score, in it the models one below the other with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from h3scale.evaluation.measures import HIGHER_IS_BETTER
from h3scale.evaluation.plot_style import STYLE
from h3scale.evaluation.report_colours import INK, MUTED, PAPER, colour_of

COLUMNS = 3  # NLL of three alignments, MC1 to MC3, three ways to prefer an answer
METRICS = {"nll": "NLL", "mc1": "MC1", "mc2": "MC2", "mc3": "MC3", "accuracy": "preferred"}
METRICS |= {"accuracy_per_token": "preferred/token", "accuracy_per_char": "preferred/character"}
CHANCE = 0.5  # of a pair

Key = tuple[str, str, str | None]


def score_keys(results: Mapping[str, Mapping[str, Any]]) -> list[Key]:
    """Task, metric and alignment of every score that some model has, in the suite's order."""
    return list(dict.fromkeys(_key(score) for result in results.values() for score in result["scores"]))


def score_at(result: Mapping[str, Any], key: Key) -> dict[str, Any] | None:
    """One score of a model's result, if it has it."""
    return next((score for score in result["scores"] if _key(score) == key), None)


def score_name(key: Key) -> str:
    """A score for people: what was asked and the metric."""
    return f"{task_name(key)}: {METRICS[key[1]]}"


def task_name(key: Key) -> str:
    """The task, and the alignment where the task's name does not say it."""
    task, _, alignment = key
    return f"{task} ({alignment})" if alignment and alignment not in task else task


def draw_scores(results: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """The picture as a file; the last model is the one in ink."""
    alignments = list(dict.fromkeys(key[2] for key in score_keys(results) if key[2]))
    with mpl.rc_context(STYLE):
        figure = scores_figure(results, alignments, list(results)[-1])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def scores_figure(results: Mapping[str, Mapping[str, Any]], alignments: Sequence[str], main: str) -> Figure:
    """A panel a score; the main model's name is in ink, and its point is filled."""
    keys = score_keys(results)
    columns = min(COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(0.9 + 3.1 * columns, rows * (0.7 + 0.2 * len(results))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, key in enumerate(keys):
        _panel(panels[place], results, key, alignments, main)
        panels[place].tick_params(labelleft=place % columns == 0)
    for left_over in panels[len(keys) :]:
        left_over.remove()
    return figure


def _panel(axes: Any, results: Mapping[str, Mapping[str, Any]], key: Key, alignments: Sequence[str], main: str) -> None:
    colour = colour_of(key[2], alignments)
    for y, (name, result) in enumerate(results.items()):
        score = score_at(result, key)
        if score:
            face = colour if name == main else PAPER
            axes.plot([score["low"], score["high"]], [y, y], color=colour, linewidth=1.6, alpha=0.55)
            axes.plot(score["mean"], y, "o", color=colour, markerfacecolor=face, markersize=5)
    if key[1].startswith("accuracy"):
        axes.axvline(CHANCE, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.set_yticks(range(len(results)), [name.replace("_", " ") for name in results])
    for label, name in zip(axes.get_yticklabels(), results, strict=True):
        label.set_color(INK if name == main else MUTED)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    better = "higher is better" if HIGHER_IS_BETTER[key[1]] else "lower is better"
    axes.tick_params(labelsize=8)
    axes.set_title(score_name(key), loc="left", fontsize=8.5, color=colour, fontweight="bold")
    axes.set_xlabel(better, fontsize=7.5, labelpad=1)


def _key(score: Mapping[str, Any]) -> Key:
    return score["task"], score["metric"], score["alignment"]
