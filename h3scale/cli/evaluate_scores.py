"""A suite's scores on the terminal: models side by side, then the last against each other one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h3scale.evaluation.score_plots import Key

INTERVAL_WIDTH = 18  # as in +0.123 to +0.456
MEAN_WIDTH = 8  # as in +0.123 -
GAP = 3  # between columns


def show_scores(console: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    """`results`: by model, as `h3scale.evaluation.suite.result_of` gives them, the last with `paired`."""
    from h3scale.evaluation.measures import HIGHER_IS_BETTER
    from h3scale.evaluation.score_plots import score_at, score_keys, score_name

    first = next(iter(results.values()))
    keys = score_keys(results)
    with_intervals = _fit(console, keys, len(results) + 1)
    told = "95% intervals" if with_intervals else "intervals in the picture and in the JSON"
    title = f"Suite {first['suite']}, {told}; higher is better, but for NLL"
    for names in _tables(console, keys, [*results, "items"]):
        table = _table(title, names)
        for key in keys:
            found = {name: score_at(result, key) for name, result in results.items()}
            means = {score["mean"] for score in found.values() if score}
            best = max(means) if HIGHER_IS_BETTER[key[1]] else min(means)
            counts = sorted({score["items"] for score in found.values() if score})
            cells = {name: _cell(score, best if len(means) > 1 else None, with_intervals) for name, score in found.items()}
            cells["items"] = " / ".join(map(str, counts))
            table.add_row(score_name(key), *(cells[name] for name in names))
        console.print(table)
        title = ""
    _show_paired(console, results)
    for note in dict.fromkeys(note for result in results.values() for note in result["notes"]):
        concerned = [name for name, result in results.items() if note in result["notes"]]
        whom = f"{', '.join(concerned)}: " if len(concerned) < len(results) else ""
        console.print(f"{whom}note: {note}", soft_wrap=True)


def _show_paired(console: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    from h3scale.evaluation.score_plots import score_keys, score_name

    *_, last = results
    paired = results[last].get("paired")
    if not paired:
        return
    title = f"{last} minus each other model, on the same items; + better, - worse beyond chance"
    keys = score_keys({last: results[last]})
    with_intervals = _fit(console, keys, len(paired))
    for names in _tables(console, keys, list(paired)):
        table = _table(title, names)
        for key in keys:
            cells = []
            for differences in (paired[name] for name in names):
                found = next((d for d in differences if (d["task"], d["metric"], d["alignment"]) == key), None)
                cells.append(_difference(found, with_intervals) if found else "")
            table.add_row(score_name(key), *cells)
        console.print(table)
        title = ""
    told = [d for differences in paired.values() for d in differences]
    sure = sum(d["better"] is not None for d in told)
    chance = "of differences that are none, one in twenty looks like one"
    console.print(f"{sure} of {len(told)} differences have an interval without 0; {chance}", soft_wrap=True)


def _fit(console: Any, keys: Sequence[Key], columns: int) -> bool:
    """Whether the names and so many columns of intervals fit the terminal."""
    from h3scale.evaluation.score_plots import score_name

    return max(len(score_name(key)) for key in keys) + columns * (INTERVAL_WIDTH + 2) <= console.width


def _tables(console: Any, keys: Sequence[Key], names: list[str]) -> list[list[str]]:
    """The columns of one table after another, as many in each as the terminal is wide: what a row is must not be squeezed out."""
    from h3scale.evaluation.score_plots import score_name

    if _fit(console, keys, len(names)):
        return [names]
    room = console.width - max(len(score_name(key)) for key in keys) - 2 * GAP
    tables: list[list[str]] = [[]]
    used = 0
    for name in names:
        width = max(len(name), MEAN_WIDTH) + GAP
        if tables[-1] and used + width > room:
            tables.append([])
            used = 0
        tables[-1].append(name)
        used += width
    return tables


def _cell(score: Mapping[str, Any] | None, best: float | None, with_interval: bool) -> str:
    if score is None:
        return ""
    mean = f"[bold]{score['mean']:.3f}[/]" if score["mean"] == best else f"{score['mean']:.3f}"
    return f"{mean}\n[dim]{score['low']:.3f} to {score['high']:.3f}[/]" if with_interval else mean


def _difference(found: Mapping[str, Any], with_interval: bool) -> str:
    colour, mark = {True: ("green", " +"), False: ("red", " -"), None: ("dim", "  ")}[found["better"]]
    mean = f"[{colour}]{found['mean']:+.3f}{mark}[/]"
    return f"{mean}\n[dim]{found['low']:+.3f} to {found['high']:+.3f}  [/]" if with_interval else mean


def _table(title: str, names: list[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
