"""A study's pictures: how balanced the models are, alignment by alignment, and what their balance costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from h3scale.evaluation.plot_style import STYLE
from h3scale.evaluation.report_colours import GENERAL, INK, MUTED, PALETTE, PAPER
from h3scale.evaluation.report_plots import Picture, svg_of
from h3scale.study.tasks import ENSEMBLE, FUSION, MERGE, MIXTURE, RESM, SEARCHED, SINGLE

COLOURS = {
    FUSION: INK,
    MIXTURE: PALETTE[1],
    MERGE: PALETTE[0],
    SEARCHED: PALETTE[2],
    RESM: PALETTE[3],
    ENSEMBLE: PALETTE[4],
    SINGLE: GENERAL,
}
NAMES = {
    FUSION: "fusions",
    MIXTURE: "data mixtures",
    MERGE: "merges",
    SEARCHED: "merges, scaling searched",
    RESM: "RESM's variants",
    ENSEMBLE: "ensemble of logits",
    SINGLE: "base and aligned models",
}

FLOOR = -1.5  # gains below it leave the picture, which is of the models that one would take

Results = Mapping[str, Any]


def draw_study(results: Results) -> dict[str, Picture]:
    """`parallel` and, where times are known, `pareto`, by name."""
    pictures = {}
    with mpl.rc_context(STYLE):
        for name, maker in (("parallel", _parallel), ("pareto", _pareto)):
            made = maker(results)
            if made is not None:
                title, note, figure = made
                pictures[name] = Picture(name, title, note, svg_of(name, figure))
    return pictures


Made = tuple[str, str, Figure]


def best_of_groups(results: Results) -> dict[str, str]:
    """The model with the lowest mean NLL of each group of which there is one; the main model for its own."""
    found: dict[str, str] = {}
    for name, model in results["models"].items():
        group = model["group"]
        before = found.get(group)
        if group != SINGLE and (before is None or _mean_nll(results, name) < _mean_nll(results, before)):
            found[group] = name
    return found | {results["models"][results["main"]]["group"]: results["main"]}


def _mean_nll(results: Results, name: str) -> float:
    return float(results["models"][name]["mean_nll"]["mean"])


def _parallel(results: Results) -> Made | None:
    alignments, models = results["alignments"], results["models"]
    rows = {name: [model["gain"][a]["mean"] for a in alignments] for name, model in models.items()}
    rows = {name: gains for name, gains in rows.items() if None not in gains and models[name]["group"] != SINGLE}
    if not rows:
        return None
    best = {name: group for group, name in best_of_groups(results).items() if name in rows}
    figure, axes = _figure((4.6, 3.0))
    places = list(range(len(alignments)))
    for name, gains in rows.items():
        colour, is_best = COLOURS[models[name]["group"]], name in best
        axes.plot(
            places,
            gains,
            color=colour,
            linewidth=2.0 if is_best else 0.8,
            alpha=1.0 if is_best else 0.3,
            zorder=3 if is_best else 2,
        )
    below = sum(min(gains) < FLOOR for gains in rows.values())
    if below:
        axes.set_ylim(bottom=FLOOR)
    ends = [(rows[name][-1], name, COLOURS[group]) for name, group in best.items() if rows[name][-1] >= FLOOR]
    _end_names(axes, ends, len(places) - 1)
    for value, text in ((0.0, "the base"), (1.0, "the best aligned model")):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(text, (0, value), xytext=(2, 3), textcoords="offset points", color=MUTED, fontsize=7.5)
    axes.set_xticks(places, alignments)
    axes.grid(visible=True, axis="x")
    axes.set_title("gain", loc="left", color=MUTED, fontsize=9)
    note = "Strong lines: of each kind the model with the lowest mean NLL. A level line is a balanced model."
    note += f" Of {below} models a gain is below {FLOOR:g}: their lines leave the picture." if below else ""
    return "What each model gains on each alignment", note, figure


def _pareto(results: Results) -> Made | None:
    points, unknown = {}, 0
    for name, model in results["models"].items():
        cost = _cost(model)
        if model["balance"]["mean"] is not None and model["group"] != SINGLE:
            unknown += cost is None
            if cost is not None:
                points[name] = (max(cost, 1.0), model["balance"]["mean"], model["balance"])
    if not points:
        return None
    figure, axes = _figure((4.6, 3.0))
    for name, (cost, value, number) in points.items():
        colour = COLOURS[results["models"][name]["group"]]
        if number["low"] is not None:
            axes.plot([cost, cost], [number["low"], number["high"]], color=colour, linewidth=1.2, alpha=0.35)
        axes.plot(cost, value, "o", color=colour, markersize=5, markeredgecolor=PAPER, markeredgewidth=0.6)
    below = sum(value < FLOOR for _, value, _ in points.values())
    if below:
        axes.set_ylim(bottom=FLOOR)
    edge = frontier({name: (cost, value) for name, (cost, value, _) in points.items()})
    axes.plot(
        [points[n][0] for n in edge], [points[n][1] for n in edge], color=MUTED, linewidth=1, drawstyle="steps-post", zorder=1
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_formatter(_plain)
    named = [n for n in (edge[0], edge[-1], *best_of_groups(results).values()) if n in points and points[n][1] >= FLOOR]
    _point_names(axes, results, {n: points[n][:2] for n in named})
    axes.set_xlabel("seconds of training and making, after the base")
    axes.set_title("balance: the least gain", loc="left", color=MUTED, fontsize=9)
    note = "Up is balanced, left is cheap; the line joins models that no other beats in both. Bars: 95% intervals of the items."
    note += f" {below} models are below {FLOOR:g}." if below else ""
    note += f" Not shown: {unknown} whose time is not known." if unknown else ""
    return "What balance costs", note, figure


def _plain(value: float, place: int | None = None) -> str:
    """Of a logarithmic axis the places that begin with 1, 2, 3 or 5."""
    return f"{value:,.0f}" if f"{value:.0e}"[0] in "1235" else ""


def _point_names(axes: Any, results: Results, points: Mapping[str, tuple[float, float]]) -> None:
    """Names to the left of their points, if there is room, each at a height of its own, with a line to where the point is."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    before = float("-inf")
    for name, (cost, value) in sorted(points.items(), key=lambda entry: entry[1][1]):
        is_right = cost > left * (right / left) ** 0.3
        before = max(value, before + 0.07 * (high - low))
        colour = COLOURS[results["models"][name]["group"]]
        aside = ScaledTranslation((-9 if is_right else 9) / 72, 2 / 72, axes.figure.dpi_scale_trans)
        axes.annotate(name.replace("_", " "), (cost, value), xytext=(cost, before), textcoords=axes.transData + aside, va="bottom",
                      ha="right" if is_right else "left", fontsize=7.5, fontweight="bold", color=colour,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0,
                                  "relpos": (1.0 if is_right else 0.0, 0.3)})  # fmt: skip


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, value) that no other is cheaper and at least as good as, the cheapest first."""
    found: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not found or points[name][1] > points[found[-1]][1]:
            found.append(name)
    return found


def _cost(model: Mapping[str, Any]) -> float | None:
    known = [model[key] for key in ("train_s", "make_s")]
    return None if None in known else float(sum(known))


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _end_names(axes: Any, ends: Sequence[tuple[float, str, str]], x: float) -> None:
    """Names at the right, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, before = 0.07 * (high - low), float("-inf")
    for value, name, colour in sorted(ends):
        before = max(value, before + gap)
        axes.annotate(name.replace("_", " "), (x, before), xytext=(6, 0), textcoords="offset points", color=colour,
                      va="center", fontsize=8, fontweight="bold", annotation_clip=False)  # fmt: skip
