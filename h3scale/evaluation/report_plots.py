"""The report's pictures: a PNG each for slides, and the same as inline SVG whose colours are the page's own.

Colours are drawn as the light theme's and replaced by CSS variables in the SVG, so that one picture serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from h3scale.evaluation.findings import Findings, Line
from h3scale.evaluation.plot_style import STYLE
from h3scale.evaluation.report_colours import DARK, GENERAL, INK, MUTED, PAPER, colour_of, css_name
from h3scale.evaluation.score_plots import scores_figure

POINTS = 150  # a longer run is shown as means of so many stretches


@dataclass(frozen=True)
class Picture:
    """`title` says what is seen, `note` how to read it; `svg` goes into the page."""

    name: str
    title: str
    note: str
    svg: str


def draw(findings: Findings, folder: Path) -> dict[str, Picture]:
    """All pictures that the findings allow, by name; their PNGs are written into `folder`."""
    makers = (_losses, _routing, _accuracy_steps, _layers, _load, _table, _scores)
    pictures = {}
    with mpl.rc_context(STYLE):
        for maker in makers:
            for name, title, note, figure in maker(findings):
                heading = figure.suptitle(fill(title, 48), x=0.01, ha="left", fontsize=11, fontweight="bold")
                figure.savefig(folder / f"{name}.png", dpi=200, bbox_inches="tight", pad_inches=0.15)
                heading.remove()  # in the page the title is text
                figure._suptitle = None  # type: ignore[attr-defined]
                pictures[name] = Picture(name, title, note, svg_of(name, figure))
    return pictures


Made = Iterator[tuple[str, str, str, Figure]]


def _losses(findings: Findings) -> Made:
    lines = findings.runs.get(findings.main, [])
    curves = {a: _curve(lines, f"lm/{a}") for a in findings.alignments}
    if not any(steps for steps, _ in curves.values()):
        curves = {"all records": _curve(lines, "lm")}
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if curves:
        with _axes("step", "nats per response token") as (figure, axes):
            named_lines(axes, curves, findings.alignments)
        _, whole = _curve(lines, "lm")
        title = f"The language-model loss goes from {whole[0]:.3g} to {whole[-1]:.3g}" if whole else "Language-model loss"
        yield "lm_loss", title, f"Training of {findings.main}, mean of neighbouring steps.", figure
    dense = {name: _curve(run, "lm") for name, run in findings.runs.items() if name != findings.main and "/" not in name}
    tuned = {name: dense.pop(name) for name in (*findings.alignments, "mixture") if name in dense}
    for name, curves, title, note in (
        ("base_loss", dense, "Before fusion: the base", "From random weights, on the text of all records."),
        ("aligned_losses", tuned, "Before fusion: the models tuned from the base", "Each on its own records."),
    ):
        curves = {run: curve for run, curve in curves.items() if len(curve[0]) > 1}
        if curves:
            with _axes("step", "nats per target token") as (figure, axes):
                named_lines(axes, curves, findings.alignments)
            yield name, title, note, figure


def _routing(findings: Findings) -> Made:
    lines = findings.runs.get(findings.main, [])
    for key, name, label, unit in (
        ("router", "router_loss", "router loss", "nats per vote and layer"),
        ("drift", "drift", "drift of the experts", "squared distance from the start"),
    ):
        steps, values = _curve(lines, key)
        if len(steps) < 2 or not any(values):
            continue
        with _axes("step", unit) as (figure, axes):
            axes.plot(steps, values, color=INK)
            axes.set_ylim(bottom=0)
        title = f"The {label} goes from {values[0]:.3g} to {values[-1]:.3g}"
        note = "0 is perfect routing." if key == "router" else "Normalised, so that it means the same at every size."
        yield name, title, note, figure


def _accuracy_steps(findings: Findings) -> Made:
    lines = findings.runs.get(findings.main, [])
    curves = {a: _curve(lines, f"router_accuracy/{a}") for a in findings.alignments}
    curves = {a: curve for a, curve in curves.items() if len(curve[0]) > 1}
    if not curves:
        return
    with _axes("step", "votes for the record's alignment") as (figure, axes):
        _share_axis(axes)
        named_lines(axes, curves, findings.alignments)
        axes.axhline(1 / len(findings.alignments), color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate("chance", (1, 1 / len(findings.alignments)), xycoords=("axes fraction", "data"), color=MUTED,
                      xytext=(0, -3), textcoords="offset points", fontsize=8, ha="right", va="top")  # fmt: skip
    worst = min(curves, key=lambda alignment: curves[alignment][1][-1])
    title = f"Routers end at {curves[worst][1][-1]:.0%} or better, token by token"
    yield "router_accuracy", title, "On training tokens. The lowest at the end: " + worst + ".", figure


def _layers(findings: Findings) -> Made:
    layers = findings.router.get("per_layer", [])
    if len(layers) < 2:
        return
    numbers = [float(i + 1) for i in range(len(layers))]
    present = [a for a in findings.alignments if a in layers[0]["accuracy"]]
    with _axes("layer", "held-out records routed right") as (figure, axes):
        _share_axis(axes)
        named_lines(axes, {a: (numbers, [layer["accuracy"][a] for layer in layers]) for a in present}, findings.alignments, "o")
    best = max(range(len(layers)), key=lambda i: layers[i]["macro"])
    title = f"Layer {best + 1} alone tells best: {layers[best]['macro']:.1%}"
    yield "router_by_layer", title, "Each layer's router by itself; all layers together vote in the figures above.", figure


def _load(findings: Findings) -> Made:
    load = findings.router.get("tokens_per_expert", {})
    rows = [a for a in findings.alignments if a in load]
    if not rows:
        return
    experts = findings.experts or [(name, name if name in findings.alignments else None) for name in load[rows[0]]]
    with _axes("", "", (4.2, 0.5 + 0.45 * len(rows))) as (figure, axes):
        for y, row in enumerate(rows):
            _stack(axes, y, load[row], experts, findings.alignments)
        axes.set_yticks(range(len(rows)), [f"{row} records" for row in rows], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    own = [sum(load[row][name] for name, a in experts if a == row) / max(sum(load[row].values()), 1) for row in rows]
    top_k = findings.router.get("top_k")
    low, high = f"{min(own):.0%}", f"{max(own):.0%}"
    title = f"{low if low == high else f'{low} to {high}'} of the choices go to the record's own experts"
    note = f"Share of the experts taken for each token and layer{f' (top {top_k})' if top_k else ''}; held-out records."
    yield "expert_load", title, note, figure


def _stack(axes: Any, y: int, load: dict[str, int], experts: Sequence[tuple[str, str | None]], alignments: Sequence[str]) -> None:
    total, left = max(sum(load.values()), 1), 0.0
    for name, alignment in experts:
        share = load[name] / total
        axes.barh(y, share, left=left, height=0.62, color=colour_of(alignment, alignments), edgecolor=PAPER, linewidth=1.2)
        if share >= 0.09:
            text = f"{name} {share:.0%}" if share >= 0.03 * (len(name) + 4) else f"{share:.0%}"
            axes.text(left + share / 2, y, text, ha="center", va="center", color=PAPER, fontsize=8, fontweight="bold")
        left += share


def _table(findings: Findings) -> Made:
    """The models x alignments table as a picture, for slides; the page has it as text."""
    models, alignments = findings.models, findings.alignments
    if not models:
        return
    with _axes("", "", (1.9 + 1.25 * len(alignments), 0.6 + 0.42 * len(models))) as (figure, axes):
        for x, alignment in enumerate(alignments):
            values = {name: model[alignment]["nll"] for name, model in models.items() if alignment in model}
            low, high = min(values.values()), max(values.values())
            for y, name in enumerate(models):
                if name not in values:
                    continue
                alpha = 0.06 + 0.44 * (high - values[name]) / max(high - low, 1e-12)
                axes.barh(y, 0.94, 0.9, left=x - 0.47, color=colour_of(alignment, alignments), alpha=alpha)
                best = values[name] == low
                axes.text(x, y, f"{values[name]:.3f}", ha="center", va="center", fontweight="bold" if best else "normal")
        axes.set_xticks(range(len(alignments)), alignments, color=INK)
        axes.set_yticks(range(len(models)), [name.replace("_", " ") for name in models], color=INK)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
    yield "models_by_alignment", "NLL per response token, models by alignment", "Lower is better; best in bold.", figure


def _scores(findings: Findings) -> Made:
    if findings.suites:
        figure = scores_figure(findings.suites, findings.alignments, findings.main)
        yield "scores", "Every model on every score", "With 95% intervals; the dashed line is chance.", figure


@contextmanager
def _axes(xlabel: str, ylabel: str, size: tuple[float, float] = (4.2, 2.6)) -> Iterator[tuple[Figure, Any]]:
    """A figure of one plot; the y label lies flat above the axis, where it can be read."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    yield figure, axes
    axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_title(ylabel, loc="left", color=MUTED, fontsize=9)
    if xlabel:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _share_axis(axes: Any) -> None:
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _curve(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key, averaged over neighbouring steps where there are many."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    size = max(1, -(-len(points) // POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    steps = [part[-1][0] for part in parts]
    return steps, [sum(value for _, value in part) / len(part) for part in parts]


def named_lines(axes: Any, curves: dict[str, tuple[list[float], list[float]]], alignments: Sequence[str], marker: str = "") -> None:
    """Lines with their names at their ends, moved apart where they would overlap; no legend to look up."""
    extra = [name for name in curves if name not in alignments]
    greys = (INK, MUTED, GENERAL)
    ends: dict[float, list[tuple[float, str, str]]] = {}
    for name, (steps, values) in curves.items():
        colour = colour_of(name, alignments) if name in alignments else greys[extra.index(name) % 3]
        axes.plot(steps, values, color=colour, marker=marker, markersize=4)
        ends.setdefault(steps[-1], []).append((values[-1], name, colour))
    low, high = axes.get_ylim()
    for step, labels in ends.items():
        labels.sort()
        places = _apart([value for value, _, _ in labels], 0.075 * (high - low), high)
        for place, (_, name, colour) in zip(places, labels, strict=True):
            axes.annotate(name.replace("_", " "), (step, place), xytext=(6, 0), textcoords="offset points", color=colour,
                          va="center", fontsize=8.5, fontweight="bold", annotation_clip=False)  # fmt: skip


def _apart(values: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending places near ascending values, at least `gap` apart and none above `top`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else top)
    return places


def svg_of(name: str, figure: Figure) -> str:
    """The figure as an SVG element without ids of other pictures, links or fonts of its own; colours by variable."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"('DejaVu Sans'|&quot;DejaVu Sans&quot;)[^;\"]*", "system-ui, sans-serif", text)
    for colour in DARK:
        text = text.replace(colour, f"var({css_name(colour)})")
    return text.strip()
