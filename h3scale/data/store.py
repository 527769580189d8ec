"""Tokenized records: in memory, or a folder that is memory-mapped, so that its size does not matter.

Shape suffixes: N records, T tokens of all of them, G segments.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from h3scale.data.encode import RESPONSE_BIT, Encoded
from h3scale.data.pages import release
from h3scale.data.parts import Part
from h3scale.errors import DataError, MissingInputError

FORMAT = 1  # of the folder; a store of another format is prepared anew
RELEASE_BYTES, RELEASE_RECORDS = 2**27, 2**12  # the kernel maps up to 64 KiB around each record of a file
SMALL_BIT = 15  # tokenizers of at most 2**15 ids are stored in two bytes a token


@dataclass(frozen=True)
class Tokens:
    """Records by number.

    tokens: (T,) uint32 (or uint16) token ids, the highest bit set in the assistant's turns. starts: (N + 1,) int64.
    responses: (N,) int32, tokens of answers. labels: (N,) int16, index into `alignments`, -1 for one that is not in it.
    """

    tokens: np.ndarray
    starts: np.ndarray
    responses: np.ndarray
    labels: np.ndarray
    alignments: tuple[str, ...]

    @classmethod
    def of(cls, encoded: Sequence[Encoded], alignments: Sequence[str] | None = None) -> "Tokens":
        """Records in memory. Labels follow `alignments`, or the order in which the records name them."""
        names = tuple(dict.fromkeys(item.record.alignment for item in encoded)) if alignments is None else tuple(alignments)
        label_of = {name: i for i, name in enumerate(names)}
        tokens = [item.tokens for item in encoded]
        return cls(
            np.concatenate(tokens) if tokens else np.zeros(0, np.uint32),
            np.cumsum([0, *(len(part) for part in tokens)]),
            np.array([item.num_response_tokens for item in encoded], np.int32),
            np.array([label_of.get(item.record.alignment, -1) for item in encoded], np.int16),
            names,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each record, (N,) int32."""
        return np.diff(self.starts).astype(np.int32)

    @property
    def response_bit(self) -> int:
        return RESPONSE_BIT if self.tokens.dtype == np.uint32 else SMALL_BIT

    @property
    def id_mask(self) -> Any:
        return self.tokens.dtype.type((1 << self.response_bit) - 1)

    def relabelled(self, alignments: Sequence[str]) -> "Tokens":
        """The same records with labels in another order; -1 for what is not in it."""
        order = np.array([alignments.index(name) if name in alignments else -1 for name in self.alignments] + [-1], np.int16)
        return replace(self, labels=order[self.labels], alignments=tuple(alignments))

    def gather(self, ids_G: np.ndarray, sizes_G: np.ndarray, pad_id: int) -> np.ndarray:
        """The first tokens of some records one after the other; a number below 0 gives `pad_id` so many times."""
        padding = np.full(int(sizes_G[ids_G < 0].max(initial=0)), pad_id, self.tokens.dtype)
        starts = self.starts[ids_G]
        parts = zip(ids_G.tolist(), starts.tolist(), (starts + sizes_G).tolist(), sizes_G.tolist(), strict=True)
        return np.concatenate([self.tokens[start:end] if i >= 0 else padding[:size] for i, start, end, size in parts])

    def responses_within(self, length: int) -> np.ndarray:
        """Tokens of answers among each record's first `length` tokens, (N,) int32; only longer records are looked into."""
        counts = self.responses.copy()
        for i in np.flatnonzero(self.lengths > length):
            start = int(self.starts[i])
            counts[i] = int((self.tokens[start : start + length] >> self.response_bit).sum())
        return counts


@dataclass(frozen=True)
class Store(Tokens):
    """A prepared folder. places: (N, 2) int64, the source file (index into the manifest's `sources`) and line of each record."""

    places: np.ndarray
    manifest: dict[str, Any]
    folder: Path
    touched: list[int] = field(default_factory=lambda: [0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder itself; nothing of it is copied."""
        return _reopened, (self.folder, self.alignments)

    def gather(self, ids_G: np.ndarray, sizes_G: np.ndarray, pad_id: int) -> np.ndarray:
        """As Tokens.gather. Now and then a large file's pages are given back, or they would count as this process's memory."""
        self.touched[0] += len(ids_G)
        if self.touched[0] > RELEASE_RECORDS and self.tokens.nbytes > RELEASE_BYTES:
            self.touched[0] = 0
            release(self.tokens)
        return super().gather(ids_G, sizes_G, pad_id)

    def where(self, record: int) -> str:
        """The file and line of a record."""
        source, line = self.places[record].tolist()
        entry = self.manifest["sources"][source]
        return Part(entry["path"], entry["kind"]).where(line)


def _size_of(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.is_file() else "is missing"


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise DataError(f"{path}: damaged (delete the folder and prepare again)") from None


def _reopened(folder: Path, alignments: Sequence[str]) -> Tokens:
    return open_store(folder).relabelled(alignments)


def open_store(folder: str | Path) -> Store:
    """Maps a prepared folder into memory. MissingInputError (66) without a manifest, DataError (65) when files are not whole."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise MissingInputError(f"{folder}: not a prepared store (no manifest.json; h3scale data prepare RECIPE makes one)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path}: damaged (delete the folder and prepare again)") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: prepared in format {manifest.get('format')}, this version reads {FORMAT} (delete the folder)")
    short = [
        f"{folder / name}: {_size_of(folder / name)}, the manifest says {size} bytes (delete the folder and prepare again)"
        for name, size in manifest["files"].items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if short:
        raise DataError(short)
    arrays = {name: _mapped(folder / f"{name}.npy") for name in ("tokens", "starts", "responses", "labels", "places")}
    return Store(
        np.asarray(arrays["tokens"]),
        np.array(arrays["starts"]),
        np.array(arrays["responses"]),
        np.array(arrays["labels"]),
        tuple(manifest["alignments"]),
        arrays["places"],
        manifest,
        folder,
    )
