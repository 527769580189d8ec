"""What `h3scale data inspect` prints. Texts of records are shown as they are: no markup, nothing that moves a cursor."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from h3scale.data.inspect import CAUSES
from h3scale.data.samples import SampleRecord, SampleRow, plain, shortened
from h3scale.evaluation.report_colours import PAPER, colour_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from h3scale.data.inspect import Inspection, SourceNumbers
    from h3scale.data.inspect_plan import PlanNumbers
    from h3scale.data.simulate import Simulation

WIDTH, NARROWEST = 100, 80
MAX_SOURCES = 20
MAX_RECORDS = 8  # of a row; the others are counted
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 240, 320
PATH_CHARACTERS = 40


def console() -> Console:
    """At most WIDTH wide; plain text where nobody looks."""
    from rich.console import Console

    width = max(NARROWEST, min(WIDTH, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else WIDTH
    return Console(highlight=False, width=width)


def show(console: Console, found: Inspection) -> None:
    """Sources, alignments and plan."""
    _show_sources(console, found)
    _show_alignments(console, found)
    _show_plan(console, found.plan)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(first, overflow="fold")  # where it is narrow, names are folded and numbers stay whole
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(text: str, style: str = "") -> Text:
    """A name from the records or of a file, which can be anything."""
    from rich.text import Text

    shown = plain(text)
    return Text(shown if len(shown) <= PATH_CHARACTERS else f"...{shown[3 - PATH_CHARACTERS :]}", style)


def _accent(alignment: str, alignments: Sequence[str]) -> Text:
    return _name(alignment, colour_of(alignment, alignments))


def _show_sources(console: Console, found: Inspection) -> None:
    table = _table("Sources", "", ("lines", "filtered", "kept", *(cause.replace("_", "\n") for cause in CAUSES)))
    shown, rest = found.sources[:MAX_SOURCES], found.sources[MAX_SOURCES:]
    for source in shown:
        _source_row(table, source.path, [source])
    if rest:
        _source_row(table, f"{len(rest):,} more", rest)
    if len(found.sources) > 1:
        table.add_section()
        _source_row(table, "all", found.sources)
    console.print(table)


def _source_row(table: Table, name: str, sources: Sequence[SourceNumbers]) -> None:
    dropped = [sum(source.dropped[cause] for source in sources) for cause in CAUSES]
    counts = [sum(getattr(source, field) for source in sources) for field in ("lines", "filtered", "records")]
    table.add_row(_name(name), *(f"{count:,}" for count in (*counts, *dropped)))


def _show_alignments(console: Console, found: Inspection) -> None:
    columns = ("records", "tokens", "answers", "min", "median", "p95", "max", "cut", "left\nout")
    table = _table("Alignments, lengths in tokens", "", columns)
    for item in found.alignments:
        lengths = (item.shortest, item.median, item.p95, item.longest)
        counts = (item.cut, item.left_out)
        table.add_row(
            _accent(item.name, found.plan.alignments),
            f"{item.records:,}",
            f"{item.tokens:,}",
            f"{item.response_share:.1%}",
            *(f"{number:,}" for number in (*lengths, *counts)),
        )
    console.print(table)


def _show_plan(console: Console, plan: PlanNumbers) -> None:
    table = _table(f"Plan of {plan.steps:,} steps", "", ("planned", "realised", "worst step", "records used", "epochs", "ends"))
    rows = zip(plan.planned_A, plan.realised_A, plan.off_A, plan.uses_SA.sum(0), plan.epochs_SA[-1], strict=True)
    for name, (planned, realised, off, uses, epochs) in zip(plan.alignments, rows, strict=True):
        ends = f"at step {plan.ended[name]:,}" if name in plan.ended else "no"
        cells = (f"{planned:.2%}", f"{realised:.2%}", f"{100 * off:.2f} points", f"{uses:,}", f"{epochs:.2f}", ends)
        table.add_row(_accent(name, plan.alignments), *cells)
    console.print(table)
    for what, text in _facts(plan):
        console.print(f" [dim]{what:<17}[/]{text}", soft_wrap=True)
    for name, step in plan.ended.items():
        note = f"reaches data.max_epochs at step {step:,}; its share goes to the others from there"
        console.print(" ", _accent(name, plan.alignments), f" {note}", sep="", soft_wrap=True)
    console.print()


def _facts(plan: PlanNumbers) -> list[tuple[str, str]]:
    from numpy import percentile

    mean, p95, most = (100 * value for value in (plan.distance_S.mean(), percentile(plan.distance_S, 95), plan.distance_S.max()))
    room = f"{plan.rows_per_batch:,} rows of {plan.sequence_length:,}"
    return [
        ("tokens per step", f"{plan.tokens_S.mean():,.0f} of {plan.positions:,} ({room})"),
        ("padding", f"{plan.waste_S.mean():.2%}, at most {plan.waste_S.max():.2%} of a step"),
        ("distance", f"mean {mean:.2f}, p95 {p95:.2f}, at most {most:.2f} points between a step's shares and the planned ones"),
        (
            "micro-batches",
            f"of {plan.rows_per_micro_batch} rows: at most {plan.micro_batch_rows_S.max():.2f} rows from the planned shares",
        ),
    ]


def show_rows(console: Console, rows: Sequence[SampleRow], alignments: Sequence[str], length: int) -> None:
    """Rows as text, a line a record: alignment, place, then prompt and response in turns."""
    for row in rows:
        tokens = length - row.padding
        console.print(
            f"[bold]Row {row.row} of step {row.step}[/]: {len(row.records):,} records, {tokens:,} tokens, padding {row.padding:,}",
            soft_wrap=True,
        )
        shown, rest = _some_of_each(row.records)
        for record in shown:
            console.print(_record(record, alignments), soft_wrap=True)
        if rest:
            counts = {a: sum(record.alignment == a for record in rest) for a in alignments}
            named = ", ".join(f"{count:,} {plain(a)}" for a, count in counts.items() if count)
            console.print(f"and {len(rest):,} more: {named}", style="dim", markup=False, soft_wrap=True)
        console.print()


def _some_of_each(records: Sequence[SampleRecord]) -> tuple[list[SampleRecord], list[SampleRecord]]:
    """The first records of each alignment, MAX_RECORDS in all or one of each, and the others."""
    limit = max(1, MAX_RECORDS // len({record.alignment for record in records}))
    parts: tuple[list[SampleRecord], list[SampleRecord]] = ([], [])
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.alignment] += 1
        parts[seen[record.alignment] > limit].append(record)
    return parts


def _record(record: SampleRecord, alignments: Sequence[str]) -> Text:
    from rich.text import Text

    colour = colour_of(record.alignment, alignments)
    tokens = f"{record.tokens:,} tokens" if record.tokens == record.length else f"{record.tokens:,} of {record.length:,} tokens"
    line = Text()
    line.append(f"[{plain(record.alignment)}]", f"bold {PAPER} on {colour}")
    line.append(f" {plain(record.where)}, {tokens}", "dim")
    for role, text in record.pieces:
        limit = RESPONSE_CHARACTERS if role == "response" else PROMPT_CHARACTERS
        line.append(f" | {role}: ", "dim")
        line.append(plain(shortened(text, limit)), colour if role == "response" else "")
    return line


def show_simulation(console: Console, found: Simulation, alignments: Sequence[str], rows_per_micro_batch: int) -> None:
    """Verdict, tokens of ranks and micro-batches, and the hash of the order."""
    ranks = f"{found.ranks:,} rank{'s' if found.ranks > 1 else ''}"
    table = _table(
        f"Simulation of {found.steps:,} steps on {ranks}, tokens",
        "",
        ("a rank: fewest", "most", f"a micro-batch of {rows_per_micro_batch}: fewest", "most"),
    )
    if found.most:  # else no step was dealt out without a fault
        columns = zip(alignments, found.tokens_NA.T, found.fewest_A.tolist(), found.most_A.tolist(), strict=True)
        for name, tokens_N, fewest, most in columns:
            _simulation_row(table, _accent(name, alignments), tokens_N, fewest, most)
        _simulation_row(table, _name("all"), found.tokens_NA.sum(1), found.fewest, found.most)
        console.print(table)
        imbalance = f"at most {found.imbalance_rows:.2f} rows of a micro-batch from its step's shares"
        spread = f"at most {found.rank_spread:.2%} of the mean between two ranks in a step"
        console.print(f" [dim]{'largest imbalance':<19}[/]{imbalance}; {spread}", soft_wrap=True)
    good = "every row to one rank, every record once an epoch"
    verdict = "[bold red]not sound[/]: the errors at the end say where" if found.faults else good
    console.print(f" [dim]{'order':<19}[/]{verdict}", soft_wrap=True)
    console.print(f" [dim]{'sha256':<19}[/]{found.order} (the same for any number of ranks)\n", soft_wrap=True)


def _simulation_row(table: Table, name: Text, tokens_N: Any, fewest: int, most: int) -> None:
    table.add_row(name, f"{tokens_N.min():,}", f"{tokens_N.max():,}", f"{fewest:,}", f"{most:,}")
