"""Packed rows as people can read them: each record's text as the model gets it, where it is from, what is padding."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from h3scale.data.loader import TypedLoader
from h3scale.data.store import Store


@dataclass(frozen=True)
class SampleRecord:
    """pieces: (role, text), role "prompt" or "response"; special tokens are shown. tokens: those in the row, of `length`."""

    alignment: str
    where: str
    tokens: int
    length: int
    pieces: list[tuple[str, str]]


@dataclass(frozen=True)
class SampleRow:
    """The `row`-th of the global batch of `step`, both counted from 0. `padding` tokens are free."""

    step: int
    row: int
    records: list[SampleRecord]
    padding: int


def sample_rows(loader: TypedLoader, tokenizer: Any, count: int) -> list[SampleRow]:
    """Rows spread evenly over the run, beginning with its first."""
    assert loader.steps is not None
    rows = loader.data.rows_per_batch
    numbers = np.unique(np.linspace(0, loader.steps * rows - 1, min(count, loader.steps * rows)).astype(np.int64))
    return [sample_row(loader, tokenizer, *divmod(number, rows)) for number in numbers.tolist()]


def sample_row(loader: TypedLoader, tokenizer: Any, step: int, row: int) -> SampleRow:
    """One row, decoded."""
    ids = loader.batch(step).rows[row].tolist()
    return SampleRow(step, row, [_record(loader, tokenizer, i) for i in ids], loader.length - int(loader.kept[ids].sum()))


def _record(loader: TypedLoader, tokenizer: Any, record: int) -> SampleRecord:
    store = loader.records
    size, start = int(loader.kept[record]), int(store.starts[record])
    tokens = np.asarray(store.tokens[start : start + size])
    is_response = (tokens >> store.response_bit).astype(bool)
    turns = np.split(np.arange(size), np.flatnonzero(is_response[1:] != is_response[:-1]) + 1)
    pieces = [
        ("response" if is_response[turn[0]] else "prompt", _decoded(tokenizer, tokens[turn] & store.id_mask)) for turn in turns
    ]
    where = store.where(record) if isinstance(store, Store) else f"record {record}"
    return SampleRecord(loader.alignments[store.labels[record]], where, size, int(store.lengths[record]), pieces)


def _decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain(text: str) -> str:
    """Text on one line that leaves a terminal as it is: control, format and other invisible characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """At most about `limit` characters: the beginning, what is left out as a number, and the end."""
    if len(text) <= limit + 24:  # the note itself takes room
        return text
    tail = limit // 4
    return f"{text[: limit - tail]} ...({len(text) - limit:,} characters more)... {text[len(text) - tail :]}"
