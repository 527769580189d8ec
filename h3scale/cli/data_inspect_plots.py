"""The picture of `h3scale data inspect`, in the look of the reports; each panel's title says what is seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from h3scale.data.inspect_plan import curves
from h3scale.data.samples import plain
from h3scale.evaluation.plot_style import STYLE
from h3scale.evaluation.report_colours import GENERAL, INK, MUTED, PAPER, colour_of

if TYPE_CHECKING:
    from h3scale.data.inspect import Inspection

LAYOUT = [["lengths", "lengths", "sizes"], ["shares", "waste", "epochs"]]
DASHES = (0, (4, 2.5))
Curves = dict[str, np.ndarray]


def draw(found: Inspection, path: Path) -> None:
    """One PNG: lengths, sizes, shares, padding and epochs."""
    names = found.plan.alignments
    line = curves(found.plan)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.06))
        axes: dict[str, Any] = figure.subplot_mosaic(LAYOUT)
        _lengths(axes["lengths"], found)
        _sizes(axes["sizes"], found)
        _shares(axes["shares"], found, line)
        _waste(axes["waste"], found, line)
        _epochs(axes["epochs"], found, line)
        handles = [Line2D([], [], color=colour_of(name, names), linewidth=5) for name in names]
        figure.legend(handles, [_short(name) for name in names], loc="outside upper left", ncols=min(len(names), 6), frameon=False,
                      handlelength=1, fontsize=10)  # fmt: skip
        figure.savefig(path, dpi=150, format="png")


def _short(name: str) -> str:
    shown = plain(name)
    return (shown if len(shown) <= 24 else f"{shown[:21]}...").replace("$", r"\$")  # matplotlib reads $ as mathematics


def _head(axes: Any, title: str, note: str) -> None:
    """The finding in bold, and below it what is drawn."""
    axes.set_title(title, loc="left", color=INK, fontsize=10.5, fontweight="bold", pad=20)
    axes.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", color=MUTED, fontsize=8.5)


def _lengths(axes: Any, found: Inspection) -> None:
    edges, counts_AB, length = found.lengths.edges, found.lengths.counts_AB, found.plan.sequence_length
    for name, counts in zip(found.plan.alignments, counts_AB, strict=True):
        share = counts / max(counts.sum(), 1)
        colour = colour_of(name, found.plan.alignments)
        axes.stairs(share, edges, color=colour, linewidth=1.8)
        axes.stairs(share, edges, color=colour, fill=True, alpha=0.1)
    if edges[-1] > 16 * edges[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    _percent_axis(axes)
    axes.set_xlabel("tokens of a record")
    over = sum(item.cut + item.left_out for item in found.alignments)
    total = sum(item.records + item.left_out for item in found.alignments)
    if edges[0] <= length <= edges[-1] * 1.3:
        axes.axvline(length, color=INK, linewidth=1, linestyle=DASHES)
        axes.annotate(f"sequence_length {length:,}", (length, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
                      textcoords="offset points", ha="right", va="top", color=INK, fontsize=8)  # fmt: skip
    title = f"{_percent(over / max(total, 1))} of the records are longer than a row" if over else "Every record fits into a row"
    _head(axes, title, "records of the alignment by length")


def _sizes(axes: Any, found: Inspection) -> None:
    names = found.plan.alignments
    tokens = np.array([item.tokens for item in found.alignments])
    bars = axes.barh(range(len(names)), tokens, height=0.62, color=[colour_of(name, names) for name in names])
    axes.bar_label(bars, [_count(value) for value in tokens], padding=4, color=INK, fontsize=8.5)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], color=INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, tokens.max() * 1.2)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    largest = int(tokens.argmax())
    title = (
        f"{_short(names[largest])} is {tokens[largest] / tokens.sum():.0%} of the data" if len(names) > 1 else "Size of the data"
    )
    _head(axes, title, "tokens of the records")


def _shares(axes: Any, found: Inspection, line: Curves) -> None:
    plan = found.plan
    steps = _edges(line)
    for a, name in enumerate(plan.alignments):
        colour = colour_of(name, plan.alignments)
        axes.fill_between(
            steps, _held(line["low"][:, a]), _held(line["high"][:, a]), step="post", color=colour, alpha=0.25, linewidth=0
        )
        axes.plot(steps, _held(line["share"][:, a]), color=colour, drawstyle="steps-post", linewidth=1.6)
    for planned in line["planned"].T:
        axes.plot(steps, _held(planned), color=INK, drawstyle="steps-post", linewidth=1, linestyle=DASHES)
    top = float(max(line["high"].max(), line["planned"].max()))
    axes.set_ylim(0, min(1.03, top * 1.35))
    _percent_axis(axes)
    mean, worst = (100 * float(value) for value in (plan.distance_S.mean(), plan.distance_S.max()))
    title = f"Shares hold to {_points(mean)} points, {_points(worst)} at worst" if worst >= 0.005 else "Shares hold exactly"
    shaded = ", shaded: extremes" if len(line["step"]) < plan.steps else ""
    _head(axes, title, f"of a step's tokens; dashed: planned{shaded}")
    _step_axis(axes, plan.steps)


def _waste(axes: Any, found: Inspection, line: Curves) -> None:
    axes.stairs(line["waste"], _edges(line), color=GENERAL, fill=True)
    axes.set_ylim(0, max(float(line["waste"].max()) * 1.35, 0.001))
    _percent_axis(axes)
    _head(axes, f"{_percent(float(found.plan.waste_S.mean()))} of the positions are padding", "padding of a step")
    _step_axis(axes, found.plan.steps)


def _epochs(axes: Any, found: Inspection, line: Curves) -> None:
    plan = found.plan
    steps = np.append(0, line["step"])
    for a, name in enumerate(plan.alignments):
        axes.plot(steps, np.append(0, line["epochs"][:, a]), color=colour_of(name, plan.alignments))
    for name, step in plan.ended.items():
        a = plan.alignments.index(name)
        axes.plot(step, plan.epochs_SA[-1, a], "o", color=colour_of(name, plan.alignments), markersize=6, markeredgecolor=PAPER)
    axes.set_ylim(bottom=0)
    last = plan.epochs_SA[-1]
    note = "times that each record was used" + ("; a dot: max_epochs reached" if plan.ended else "")
    _head(axes, _epochs_title(plan.alignments, last), note)
    _step_axis(axes, plan.steps)


def _epochs_title(names: Sequence[str], last: np.ndarray) -> str:
    most, least = int(last.argmax()), int(last.argmin())
    if len(names) == 1:
        return f"Each record is used {last[0]:.2g} times"
    if f"{last[most]:.1f}" == f"{last[least]:.1f}":
        return f"All records are used {last[most]:.1f} times"
    return f"{_short(names[most])} is used {last[most]:.1f} times, {_short(names[least])} {last[least]:.1f}"


def _edges(line: Curves) -> np.ndarray:
    return np.append(0, line["step"])


def _held(values: np.ndarray) -> np.ndarray:
    """A value more, so that the last step has a width."""
    return np.append(values, values[-1])


def _step_axis(axes: Any, steps: int) -> None:
    axes.set_xlim(0, steps)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _percent_axis(axes: Any) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}%"))


def _points(value: float) -> str:
    return f"{value:.1f}" if value >= 0.2 else f"{value:.2f}"


def _percent(share: float) -> str:
    """With as many decimals as tell it from 0."""
    if 0 < share < 5e-5:
        return "Under 0.01%"
    decimals = 0 if share >= 0.1 or share == 0 else 1 if share >= 0.01 else 2
    return f"{share:.{decimals}%}"


def _count(value: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)
