"""Records from files, folders and hub sets, in blocks: memory does not depend on the size of the data.

JSON lines are read by our own reader: a finding must name file and line, and the one of `datasets` names neither.
Tables (Parquet, CSV, hub sets) go through `datasets`; their findings name the row, counted from 1 without the header.
The parent process cuts the data into blocks and parses nothing; blocks and what is parsed of them are picklable, so
that workers can parse. The one exception are sets with a cut (TruthfulQA): these are read whole, by the parent.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h3scale.config.data import Source
from h3scale.data.adapters import ADAPTERS, Adapter, Side, sides
from h3scale.data.lines import read_lines
from h3scale.data.parts import Part, hub_name, parts_of
from h3scale.data.records import BadRow, Record, Row, check_sound, parse_line, record_of, shown
from h3scale.data.tables import read_hub, read_table
from h3scale.errors import DataError
from h3scale.log import logger

MAX_SHOWN = 20  # findings printed before "and N more"
MAX_BLOCK_BYTES = 8 * 2**20  # of texts; one line can be longer
MAX_CUT_ROWS = 5000  # of a set with a cut: it is held in memory, and grouping takes time with the square
BLOCK_LINES = 1000

# bytes: a line. dict: a row. str: what is wrong with a line that could not be read. None: on the other side of a cut.
Entry = bytes | dict[str, Any] | str | None


@dataclass(frozen=True)
class Block:
    """Consecutive lines or rows of a part, from number `first` on (1-based)."""

    part: Part
    first: int
    lines: list[Entry]


@dataclass
class Parsed:
    """What a block holds. places: line or row of each record. findings: one for each bad line or row, with its number."""

    records: list[Record] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    findings: list[tuple[int, str]] = field(default_factory=list)
    filtered: int = 0  # rows that the adapter leaves out, or that are on the other side of its cut


def blocks(part: Part, size: int = BLOCK_LINES) -> Iterator[Block]:
    """A part's lines or rows, at most `size` a block and fewer where they are long.

    Raises DataError (65) for a file without records or one that is broken as a whole, MissingInputError (66) for what
    cannot be read.
    """
    entries = _entries(part)
    if part.part is not None:
        entries = _one_side(entries, part)
    lines: list[Entry] = []
    first, num_bytes, blank = 1, 0, True
    for entry in entries:
        blank = blank and isinstance(entry, bytes) and entry.isspace()
        lines.append(entry)
        num_bytes += _num_bytes(entry)
        if len(lines) == size or num_bytes >= MAX_BLOCK_BYTES:
            yield Block(part, first, lines)
            first, num_bytes, lines = first + len(lines), 0, []
    if blank:
        raise DataError(f"{part.path}: no records")
    if lines:
        yield Block(part, first, lines)


def parse_block(block: Block) -> Parsed:
    """The records of a block. Pure; ids that are used twice are the caller's to find, who sees all blocks."""
    parsed = Parsed()
    adapter = ADAPTERS[block.part.adapter] if block.part.adapter else None
    for number, entry in enumerate(block.lines, start=block.first):
        if isinstance(entry, bytes) and entry.isspace():
            continue
        try:
            records = [] if entry is None else _records(entry, block.part, number, adapter)
        except BadRow as error:
            parsed.findings.append((number, str(error)))
            continue
        parsed.filtered += not records
        parsed.records += records
        parsed.places += [number] * len(records)
    return parsed


def read_records(
    sources: Sequence[str | Path | Source], alignments: Sequence[str] | None = None, max_bad: float = 0.0
) -> list[Record]:
    """All records of some sources, in order; with `alignments`, only theirs. Bad lines up to the share `max_bad` are left out.

    Raises as `parts_of` and `blocks` do, and DataError (65) for every bad line, an id that is used twice, a part without
    records and an alignment that has none.
    """
    records: list[Record] = []
    findings: list[str] = []
    bad_lines: list[str] = []
    seen: dict[str, str] = {}
    parts = parts_of(sources)
    for part in parts:
        try:
            found, bad = _read_part(part, seen)
        except DataError as error:
            found, bad = [], []
            findings += error.findings
        records += found
        bad_lines += bad
    if len(bad_lines) > max_bad * (len(records) + len(bad_lines)):
        findings += bad_lines
    elif bad_lines:
        logger.warning("%d bad records left out, such as %s", len(bad_lines), bad_lines[0])
    if alignments is not None:
        records = [record for record in records if record.alignment in alignments]
        present = {record.alignment for record in records}
        named = ", ".join(part.path for part in parts)
        findings += [f"{named}: alignment '{name}' has no records" for name in alignments if name not in present]
    if findings:
        more = [f"and {len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []
        raise DataError(findings[:MAX_SHOWN] + more)
    return records


def _read_part(part: Part, seen: dict[str, str]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    findings: list[tuple[int, str]] = []
    filtered = 0
    for parsed in map(parse_block, blocks(part)):
        findings += parsed.findings
        filtered += parsed.filtered
        for record, number in zip(parsed.records, parsed.places, strict=True):
            place = part.where(number)
            if seen.setdefault(record.id, place) is not place:
                findings.append((number, f"id '{shown(record.id)}' was used before, in {seen[record.id]}"))
            else:
                records.append(record)
    if filtered and not records and not findings:
        return [], [f"{part.path}: no records ({filtered} rows left out by adapter {part.adapter})"]
    return records, [f"{part.where(number)}: {what}" for number, what in sorted(findings)]


def _records(entry: bytes | dict[str, Any] | str, part: Part, number: int, adapter: Adapter | None) -> list[Record]:
    if isinstance(entry, str):
        raise BadRow(entry)
    row: Row = parse_line(entry) if isinstance(entry, bytes) else entry
    name = f"{part.stem}-{number}"
    if adapter is None:
        records = [record_of(row, name, part.alignment)]
    else:
        answers = adapter.said(row)
        alignment = part.alignment or adapter.alignment or ""
        names = [name] if len(answers) == 1 else [f"{name}.{index}" for index in range(1, len(answers) + 1)]
        records = [
            Record(id, alignment, prompt, response, adapter.source, history)
            for id, (history, prompt, response) in zip(names, answers, strict=True)
        ]
    if not isinstance(entry, bytes) or b"\\u" in entry:
        for record in records:
            check_sound(record)
    return records


def _entries(part: Part) -> Iterator[Entry]:
    if part.kind != "hub":
        lines = part.kind.startswith("jsonl")
        yield from read_lines(part.path, part.kind == "jsonl.gz") if lines else read_table(part.path, part.kind)
        return
    adapter = ADAPTERS[part.adapter] if part.adapter else None
    name, folder = hub_name(part.path)
    config = adapter.config if adapter else None
    yield from read_hub(name, part.adapter, config, folder or (adapter.folder if adapter else None), part.split)


def _one_side(entries: Iterable[Entry], part: Part) -> Iterator[Entry]:
    """Bad rows are on both sides, so that either reading tells of them."""
    column = ADAPTERS[part.adapter or ""].cut or ""
    held: list[Entry] = []
    for entry in entries:
        held.append(entry)
        if len(held) > MAX_CUT_ROWS:
            raise DataError(f"{part.path}: more than {MAX_CUT_ROWS:,} rows, too many to be cut by likeness of {column}")
    texts = {index: text for index, entry in enumerate(held) if (text := _text_at(entry, column))}
    side: dict[int, Side] = dict(zip(texts, sides(list(texts.values())), strict=True))
    for index, entry in enumerate(held):
        yield entry if side.get(index, part.part) == part.part else None


def _text_at(entry: Entry, column: str) -> str | None:
    try:
        row = parse_line(entry) if isinstance(entry, bytes) else entry
    except BadRow:
        return None
    text = row.get(column) if isinstance(row, dict) else None
    return text if isinstance(text, str) else None


def _num_bytes(entry: Entry) -> int:
    if isinstance(entry, dict):
        return sum(len(value) for value in entry.values() if isinstance(value, str))
    return len(entry or "")
