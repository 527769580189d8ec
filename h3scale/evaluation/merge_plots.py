"""Pictures of a merge: where the models collide, and how its scaling was chosen."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from h3scale.evaluation.plot_style import STYLE
from h3scale.evaluation.report_colours import ACCENTS, GENERAL, INK, MUTED, PAPER, RULE
from h3scale.evaluation.report_plots import named_lines

WRITTEN = 40  # layers, above which cells are too small for numbers
DARK_SHARE = 0.6  # of a colour's range, from which its ink is paper
_BLUE, _ORANGE = ACCENTS["helpful"], ACCENTS["harmless"]  # apart for every kind of colour vision
AGREE_COLLIDE = LinearSegmentedColormap.from_list("agree_collide", [_BLUE, PAPER, _ORANGE])
MORE = LinearSegmentedColormap.from_list("more", [PAPER, ACCENTS["honest"]])

Panel = tuple[str, str, LinearSegmentedColormap, float, Callable[[float], str]]
PANELS: tuple[Panel, ...] = (
    ("cosine", "cosine of the changes", AGREE_COLLIDE.reversed(), 0.0, "{:+.2f}".format),
    ("sign_conflict", "signs that differ", AGREE_COLLIDE, 0.5, "{:.0%}".format),
    ("overlap", "directions in common", MORE, 0.0, "{:.0%}".format),
)


def draw_conflicts(explained: Mapping[str, Any], title: str, path: Path) -> None:
    """A heat map of layers by pairs of models for each of the three figures; orange is where models collide."""
    layers = explained["layers"]
    pairs = [" / ".join(pair["models"]) for pair in layers[0]["pairs"]] if layers else []
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        height = 1.9 + 0.17 * len(layers)
        figure = Figure(figsize=(1.4 + len(PANELS) * (0.9 + 0.55 * len(pairs)), height), layout="constrained")
        all_axes = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, PANELS, strict=True):
            values = np.array([[_number(pair[panel[0]]) for pair in layer["pairs"]] for layer in layers]).reshape(len(layers), -1)
            _heat_map(figure, axes, values, panel, pairs)
        all_axes[0].set_yticks(range(len(layers)), [layer["layer"] for layer in layers], fontsize=8)
        all_axes[0].set_ylabel("layer")
        figure.suptitle(fill(title, 90), x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.15)


def draw_search(search: Mapping[str, Any], title: str, path: Path) -> None:
    """The objective over every value that was searched, with the best of the other option, and each alignment there."""
    axes_keys = search["searched"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 4.2 * len(axes_keys), 3.0), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(axes_keys), squeeze=False)[0], axes_keys, strict=True):
            _curve(axes, search["trials"], key)
            axes.set_title("nats per response token", loc="left", color=MUTED, fontsize=9)
        figure.suptitle(fill(title, 48 * len(axes_keys)), x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.15)


def _heat_map(figure: Figure, axes: Any, values: np.ndarray, panel: Panel, pairs: Sequence[str]) -> None:
    key, title, colours, middle, written = panel
    spread = max(float(np.nanmax(np.abs(values - middle), initial=0.0)), 0.05)
    low = middle if colours is MORE else middle - spread
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=middle + spread, aspect="auto")
    axes.set_facecolor(RULE)
    axes.set_title(title, loc="left", color=MUTED, fontsize=9)
    axes.set_xticks(range(len(pairs)), pairs, rotation=30, ha="right", fontsize=8, color=INK)
    axes.spines["bottom"].set_visible(False)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=14).outline.set_visible(False)
    if key != "cosine":
        image.colorbar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    image.colorbar.ax.xaxis.set_major_locator(MaxNLocator(3))
    if len(values) <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            is_dark = abs(value - middle) > DARK_SHARE * spread
            text = "" if np.isnan(value) else written(value)
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=PAPER if is_dark else INK)


def _lowest(trials: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Of every value that was tried the best trial, in the values' order."""
    found: dict[float, Mapping[str, Any]] = {}
    for trial in sorted(trials, key=lambda trial: (float(trial["point"][key]), float(trial["nll"]))):
        found.setdefault(trial["point"][key], trial)
    return list(found.values())


def _curve(axes: Any, trials: Sequence[Mapping[str, Any]], key: str) -> None:
    lowest = _lowest(trials, key)
    places = [trial["point"][key] for trial in lowest]
    axes.scatter([trial["point"][key] for trial in trials], [trial["nll"] for trial in trials], s=10, color=GENERAL, zorder=3)
    alignments = list(trials[0]["by_alignment"])
    curves = {alignment: (places, [trial["by_alignment"][alignment] for trial in lowest]) for alignment in alignments}
    named_lines(axes, curves | {"mean": (places, [trial["nll"] for trial in lowest])}, alignments, "o")
    best = min(lowest, key=lambda trial: float(trial["nll"]))["point"][key]
    axes.axvline(best, color=GENERAL, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(f"{best:g}", (best, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2), color=MUTED,
                  textcoords="offset points", fontsize=8, ha="right", va="top")  # fmt: skip
    axes.set_xlabel(key.replace("_", " "))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
