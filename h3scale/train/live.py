"""A run as a person watches it: a view on rank 0's terminal, plain lines where there is none."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from h3scale import log
from h3scale.config.recipe import TrainRecipe
from h3scale.train.metrics import HELD_OUT, LOSSES
from h3scale.train.timing import ALL_TO_ALL, PHASES
from h3scale.train.trackers import Line, Tracker

WIDEST = 112  # columns; wider lines are hard to follow
TWO_COLUMNS = 84  # from here on tables stand side by side
GAP = 4  # between them
ALL_COLUMNS = 52  # from here on the table of alignments has held-out figures and the router's loss
HISTORY = 2000  # steps that a curve shows at most
RECENT = 30  # steps that the speed is taken from
REFRESH_PER_S = 2
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")  # of alignments, in their order, as often as needed
BLOCKS, LEVELS = " ▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS, PLAIN_LEVELS = " #", "_.-'"  # for terminals that know no more than ASCII


class View:
    """Draws the last step's line and the curves up to it, for any width."""

    def __init__(self, title: str, steps: int, alignments: Sequence[str], experts: Sequence[str], notes: Iterable[str] = ()):
        self.title, self.steps = title, steps
        self.alignments, self.experts, self.notes = list(alignments), list(experts), list(notes)
        self.line: Line = {}
        self.held_out: Line = {}  # the last of these lines
        self.curves: dict[str, deque[float]] = {}
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.began = time.monotonic()

    def take(self, line: Line) -> None:
        """The line of one more step, or of held-out records after one."""
        if "seconds" not in line:
            self.held_out = line
            return
        self.line = line
        self.seconds.append(line["seconds"])
        for name in LOSSES:
            if name in line:
                self.curves.setdefault(name, deque(maxlen=HISTORY)).append(line[name])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        self.blocks, self.levels = (PLAIN_BLOCKS, PLAIN_LEVELS) if options.ascii_only else (BLOCKS, LEVELS)
        yield from self._head(width)
        if not self.line:
            yield Text("waiting for the first step", style="dim")
            return
        wide = width >= TWO_COLUMNS
        column = (width - GAP) // 2 if wide else width
        for row in ([self._losses(column), self._alignments(column)], [self._experts(column), self._times(column)]):
            shown = [part for part in row if part is not None]
            if wide:
                yield Text()
                yield _side_by_side(shown, column)
            else:
                yield from (item for part in shown for item in (Text(), part))

    def _head(self, width: int) -> Iterable[RenderableType]:
        step = self.line.get("step", 0)
        share = step / max(self.steps, 1)
        mean_s = sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
        gone = log.clock(time.monotonic() - self.began)
        left = f"{log.clock((self.steps - step) * mean_s)} left" if self.seconds else "time left unknown yet"
        yield _ends(Text(self.title, style="bold"), Text(f"step {step:,} of {self.steps:,}"), width)
        percent = f" {share:4.0%} "
        yield Text(bar(share, width - len(percent), self.blocks), style="cyan").append(percent, style="bold default")
        yield _ends(Text(f"{gone} gone", style="dim"), Text(left, style="bold"), width)
        facts = [f"{log.short(self.line['tokens_per_s'])} tokens/s", f"{mean_s:.3g} s a step"] if self.line else []
        facts += [f"MFU {self.line['mfu']:.1%}"] if "mfu" in self.line else []
        facts += [f"{self.line['memory_gib']:.1f} GiB"] if "memory_gib" in self.line else []
        facts += [f"lr {self.line['lr']:.2e}"] if "lr" in self.line else []
        facts += [f"gradient {self.line['grad_norm']:.3g}"] if "grad_norm" in self.line else []
        if facts:
            yield Text("   ".join(facts))
        for note in self.notes:
            yield Text(note, style="dim", overflow="crop", no_wrap=True)

    def _losses(self, width: int) -> RenderableType:
        table = _table("loss", "now", "so far")
        names = [name for name in LOSSES if name in self.curves]
        room = width - max(len(name) for name in (*names, "loss")) - 14
        for name in names:
            now = f"{self.line[name]:.4g}" if name in self.line else "not finite"
            table.add_row(name, now, Text(sparkline(self.curves[name], room, self.levels), style="cyan"))
        return table

    def _alignments(self, width: int) -> RenderableType | None:
        shown = [a for a in self.alignments if f"lm/{a}" in self.line]
        if not shown:
            return None
        routed = any(f"router_accuracy/{a}" in self.line for a in shown)
        unseen = bool(self.held_out)
        brief = unseen and width < ALL_COLUMNS  # then the router's loss gives way: right experts say more
        routing = [] if not routed else ["right"] if brief else ["router", "right experts"]
        table = _table("alignment", "lm", *(["held out"] if unseen else []), *routing)
        room = width - max(len(a) for a in (*shown, "alignment")) - (24 if brief else 26 + 10 * unseen)
        for alignment in shown:
            row: list[RenderableType] = [self._name(alignment), f"{self.line[f'lm/{alignment}']:.3f}"]
            if unseen:
                value = self.held_out.get(f"{HELD_OUT}lm/{alignment}")
                row.append("" if value is None else f"{value:.3f}")
            accuracy = self.line.get(f"router_accuracy/{alignment}")
            if accuracy is not None:
                right = Text(bar(accuracy, room, self.blocks), style=self._colour(alignment)).append(f" {accuracy:4.0%}", "default")
                row += [right] if brief else [f"{self.line[f'router/{alignment}']:.3f}", right]
            table.add_row(*row)
        return table

    def _experts(self, width: int) -> RenderableType | None:
        taken = {name: self.line[f"tokens_per_expert/{name}"] for name in self.experts if f"tokens_per_expert/{name}" in self.line}
        if not taken:
            return None
        total, most = max(sum(taken.values()), 1), max(*taken.values(), 1)
        table = _table("expert", "tokens", "share")
        room = width - max(len(name) for name in (*taken, "expert")) - 17
        for name, tokens in taken.items():
            drawn = Text(bar(tokens / most, room, self.blocks), style=self._colour(name)).append(
                f" {tokens / total:4.0%}", "default"
            )
            table.add_row(self._name(name), log.short(tokens), drawn)
        even, worst = self.line["load_max_over_mean"], self.line["load_max_over_mean_worst_layer"]
        return Group(table, Text(f"busiest over mean {even:.2f}, worst layer {worst:.2f}", style="dim"))

    def _times(self, width: int) -> RenderableType | None:
        spent = {name: self.line.get(f"seconds/{name}", 0.0) for name in (*PHASES, ALL_TO_ALL)}
        whole = max(sum(spent[name] for name in PHASES), 1e-9)
        names = [name for name in spent if name in PHASES or spent[name]]
        shown = {name: "of it all-to-all" if name == ALL_TO_ALL else name for name in names}
        table = _table("time of a step", "s", "share")
        room = width - max(len(name) for name in (*shown.values(), "time of a step")) - 16
        for name in names:
            style = "dim" if name == ALL_TO_ALL else "blue"
            drawn = Text(bar(spent[name] / whole, room, self.blocks), style=style).append(f" {spent[name] / whole:4.0%}", "default")
            table.add_row(Text(shown[name], style="dim" if name == ALL_TO_ALL else ""), f"{spent[name]:.3g}", drawn)
        return table

    def _colour(self, expert: str) -> str:
        """An alignment's experts have its colour; 'helpful 2' is helpful's second."""
        own = [i for i, name in enumerate(self.alignments) if expert == name or expert.startswith(f"{name} ")]
        return COLOURS[own[0] % len(COLOURS)] if own else "white"

    def _name(self, expert: str) -> Text:
        return Text(expert, style=self._colour(expert))


class LiveView:
    """The view on a terminal. What cannot be drawn is left out; the run goes on, and the terminal is left as it was."""

    def __init__(self, view: View, console: Console | None = None):
        self.view = view
        self.console = console or Console(file=log.terminal(), highlight=False)
        self.live = Live(
            get_renderable=self._draw,
            console=self.console,
            refresh_per_second=REFRESH_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.stack = ExitStack()
        self.stack.enter_context(self.live)
        self.console.show_cursor(True)  # hidden, it would stay so after a SIGKILL
        self.stack.enter_context(log.printing_through(self._print))

    def write(self, step: int, line: Line) -> None:
        self.view.take(line)

    def close(self) -> None:
        self.stack.close()

    def _draw(self) -> RenderableType:
        try:
            width = self.console.width
            lines = self.console.render_lines(self.view, self.console.options.update(width=width))
            return Text("\n").join(Text.assemble(*((s.text, s.style or "") for s in line)) for line in lines)
        except Exception as error:
            return Text(f"the view cannot be drawn: {error}")

    def _print(self, text: str, level: int) -> None:
        style = "bold red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else ""
        self.console.print(Text(text, style=style), soft_wrap=True)


class PlainLines:
    """A line every ten seconds; on a terminal one line that moves."""

    def __init__(self, steps: int, first_step: int = 0):
        self.bar = log.Progress("train", steps, "steps", first_step)

    def write(self, step: int, line: Line) -> None:
        if "seconds" in line:
            self.bar.advance(1, summary(line))
        else:
            log.logger.info("step %d: %s", step, held_out_summary(line))

    def close(self) -> None:
        if self.bar.on_terminal and self.bar.before < self.bar.done < self.bar.total:
            log.terminal().write("\n")


def open_view(
    recipe: TrainRecipe, alignments: Sequence[str], experts: Sequence[str], notes: Iterable[str] = (), first_step: int = 0
) -> Tracker:
    """The view for where this process runs, of a run that goes on after `first_step` steps. For one rank only."""
    console = Console(file=log.terminal(), highlight=False)
    if recipe.tracking.live and console.is_terminal and not console.is_dumb_terminal:
        return LiveView(View(f"h3scale train {Path(recipe.out)}", recipe.steps, alignments, experts, notes), console)
    for note in notes:
        log.logger.info(note)
    return PlainLines(recipe.steps, first_step)


def summary(line: Line) -> str:
    """The figures that one line has room for."""
    parts = [f"{name} {line[name]:.3f}" for name in LOSSES if name in line]
    accuracy = [value for name, value in line.items() if name.startswith("router_accuracy/")]
    parts += [f"right experts {min(accuracy):.0%}+"] if accuracy else []
    parts.append(f"{log.short(line['tokens_per_s'])} tokens/s")
    return "  ".join(parts + ([f"MFU {line['mfu']:.1%}"] if "mfu" in line else []))


def held_out_summary(line: Line) -> str:
    """NLL of held-out records, for one line."""
    names = {name.removeprefix(f"{HELD_OUT}lm"): value for name, value in line.items() if name.startswith(f"{HELD_OUT}lm")}
    return "held out: " + "  ".join(f"{name.removeprefix('/') or 'lm'} {value:.4f}" for name, value in names.items())


def bar(share: float, width: int, blocks: str = BLOCKS) -> str:
    """`width` characters, as much of them filled as `share` of 1 says."""
    fine = len(blocks) - 1
    eighths = round(min(max(share, 0.0), 1.0) * max(width, 0) * fine)
    full, rest = divmod(eighths, fine)
    return (blocks[-1] * full + (blocks[rest] if rest else "")).ljust(max(width, 0))


def sparkline(values: Iterable[float], width: int, levels: str = LEVELS) -> str:
    """At most `width` characters from the lowest to the highest level; each the mean of as many neighbouring values."""
    values = list(values)
    if width < 1 or not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    top = len(levels) - 1
    return "".join(levels[round((mean - low) / (high - low) * top)] if high > low else levels[0] for mean in means)


def _table(*headings: str) -> Table:
    """Headings, then rows: names, numbers set right, and at last what is drawn."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    for i, heading in enumerate(headings):
        last = i == len(headings) - 1
        numbers = i > 0 and not (last and len(headings) > 2)
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=True, overflow="crop")
    return table


def _side_by_side(parts: Sequence[Any], column: int) -> Table:
    grid = Table.grid(padding=(0, GAP, 0, 0))
    for _ in parts:
        grid.add_column(width=column)
    grid.add_row(*parts)
    return grid


def _ends(left: Text, right: Text, width: int) -> Text:
    """One line with a text at either end; the left one gives way."""
    left.truncate(max(width - len(right) - 1, 0), overflow="crop")
    return left.append(" " * max(width - len(left) - len(right), 1)).append_text(right)
