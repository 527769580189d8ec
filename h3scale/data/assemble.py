"""Chunks into one store: which records stay, why the others go, and the arrays of those that stay.

Shape suffixes: N records of all chunks, K those that are kept.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from h3scale.config.data import Hygiene
from h3scale.data.duplicates import near_duplicates
from h3scale.data.encode import RESPONSE_BIT
from h3scale.data.sources import Part
from h3scale.data.store import SMALL_BIT
from h3scale.errors import StorageError
from h3scale.log import progress

ARRAYS = ("lengths", "places", "labels", "digests", "leaks", "ids")


@dataclass
class Chunks:
    """The small arrays of all chunks behind each other, (N,); token ids and signatures stay in their files.

    lines, filtered: of each part. checked: records, good and bad. bad: source, where and what.
    """

    paths: list[Path]
    parts: list[Part]
    lengths: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    leaks: np.ndarray
    ids: np.ndarray
    sources: np.ndarray
    chunk_starts: np.ndarray
    alignments: list[str]
    lines: list[int]
    checked: int
    filtered: list[int]
    bad: list[tuple[int, str, str]]

    def where(self, record: int) -> str:
        return self.parts[self.sources[record]].where(int(self.places[record]))


def read_chunks(paths: list[Path], parts: list[Part]) -> Chunks:
    """All chunks, in order; a record whose id was used before is bad."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*ARRAYS, "sources")}
    alignments: dict[str, int] = {}
    bad: list[tuple[int, str, str]] = []
    starts, lines, filtered, checked = [0], [0] * len(parts), [0] * len(parts), 0
    for path in paths:
        try:
            with np.load(path) as chunk:
                about = json.loads(chunk["about"].tobytes())
                for name in ARRAYS:
                    columns[name].append(chunk[name])
        except (EOFError, ValueError, KeyError, BadZipFile):
            path.unlink()
            raise StorageError(f"{path}: a damaged part of an interrupted preparation, now removed (works: run it again)") from None
        source = about["source"]
        bad += [(source, parts[source].where(line), what) for line, what in about["findings"]]
        names = np.array([alignments.setdefault(name, len(alignments)) for name in about["alignments"]] or [0], np.int16)
        columns["labels"][-1] = names[columns["labels"][-1]]
        columns["sources"].append(np.full(about["records"], source, np.int32))
        starts.append(starts[-1] + about["records"])
        lines[source] += about["lines"]
        filtered[source] += about["filtered"]
        checked += about["checked"]
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    chunks = Chunks(paths, parts, **joined, chunk_starts=np.array(starts), alignments=list(alignments),
                    lines=lines, checked=checked, filtered=filtered, bad=bad)  # fmt: skip
    first_N = _first_with_the_same(chunks.ids, np.ones(len(chunks.ids), bool))
    for i in np.flatnonzero(first_N >= 0).tolist():
        chunks.bad.append((int(chunks.sources[i]), chunks.where(i), f"its id was used before, in {chunks.where(int(first_N[i]))}"))
        chunks.labels[i] = -1
    return chunks


def decide(chunks: Chunks, hygiene: Hygiene, heldout: list[str], signatures: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(N,) bool, which records stay; and of those that do not where they are, why, and what they are like."""
    keep_N = chunks.labels >= 0
    dropped = [{"source": source, "where": where, "why": "bad", "what": what} for source, where, what in chunks.bad]
    for i in np.flatnonzero(keep_N & (chunks.leaks >= 0)).tolist():
        prompt = heldout[chunks.leaks[i]]
        dropped.append({"source": int(chunks.sources[i]), "where": chunks.where(i), "why": "heldout", "what": prompt})
        keep_N[i] = False
    if hygiene.exact_duplicates:
        _drop(chunks, keep_N, _first_with_the_same(chunks.digests, keep_N), "exact_duplicate", dropped)
    if hygiene.near_duplicates is not None:
        kept = np.flatnonzero(keep_N)
        like = near_duplicates(_signatures(chunks, keep_N, signatures), hygiene.near_duplicates)
        like_N = np.full(len(keep_N), -1)
        like_N[kept[like >= 0]] = kept[like[like >= 0]]
        _drop(chunks, keep_N, like_N, "near_duplicate", dropped)
    return keep_N, dropped


def _drop(chunks: Chunks, keep_N: np.ndarray, like_N: np.ndarray, why: str, dropped: list[dict[str, Any]]) -> None:
    for i in np.flatnonzero(keep_N & (like_N >= 0)).tolist():
        names = [chunks.alignments[chunks.labels[j]] for j in (i, like_N[i])]
        across = "" if names[0] == names[1] else f" ({names[0]} here, {names[1]} there)"
        what = f"{chunks.where(int(like_N[i]))}{across}"
        dropped.append({"source": int(chunks.sources[i]), "where": chunks.where(i), "why": why, "what": what})
        keep_N[i] = False


def _first_with_the_same(digests: np.ndarray, keep_N: np.ndarray) -> np.ndarray:
    """(N,): the first kept record with the same digest, where that is another one; else -1."""
    like_N = np.full(len(digests), -1)
    kept = np.flatnonzero(keep_N)
    _, first, inverse = np.unique(digests[kept], return_index=True, return_inverse=True)
    same = kept[first[inverse]]
    like_N[kept] = np.where(same == kept, -1, same)
    return like_N


def _signatures(chunks: Chunks, keep_N: np.ndarray, path: Path) -> np.ndarray:
    """Signatures of the kept records in one mapped file, (K, P) uint32."""
    with path.open("wb") as file:
        for number, chunk_path in enumerate(chunks.paths):
            keep = keep_N[chunks.chunk_starts[number] : chunks.chunk_starts[number + 1]]
            with np.load(chunk_path) as chunk:
                rows = chunk["signatures"][keep]
            rows.tofile(file)
    return np.memmap(path, np.uint32, "r").reshape(-1, rows.shape[1])


def assemble(chunks: Chunks, keep_N: np.ndarray, vocab_size: int, folder: Path) -> tuple[dict[str, dict[str, int]], str]:
    """Writes the store's arrays; gives records, tokens and response tokens of each alignment, and a hash of what is in it."""
    small = vocab_size <= 1 << SMALL_BIT
    dtype: Any = np.uint16 if small else np.uint32
    lengths = chunks.lengths[keep_N].astype(np.int64)
    labels = chunks.labels[keep_N]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    responses = np.zeros(len(lengths), np.int32)
    content = hashlib.sha256(json.dumps(chunks.alignments).encode())
    content.update(starts.tobytes() + labels.tobytes())
    at = 0
    with (folder / "tokens.npy").open("wb") as file, progress("write", int(starts[-1]), "tokens") as bar:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (int(starts[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for keep, chunk_tokens, chunk_lengths in _kept_tokens(chunks, keep_N):
            size = int(chunk_lengths.sum())
            is_response = chunk_tokens >> RESPONSE_BIT
            if small:
                chunk_tokens = (chunk_tokens & np.uint32((1 << SMALL_BIT) - 1)) | (is_response << np.uint32(SMALL_BIT))
            written = chunk_tokens.astype(dtype)
            written.tofile(file)
            content.update(written.tobytes())
            if size:
                segments = np.cumsum(chunk_lengths) - chunk_lengths
                responses[at : at + keep] = np.add.reduceat(is_response.astype(np.int32), segments)
            at += keep
            bar.advance(size)
    np.save(folder / "starts.npy", starts)
    np.save(folder / "responses.npy", responses)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "places.npy", np.stack([chunks.sources[keep_N].astype(np.int64), chunks.places[keep_N]], 1))
    sums = {"records": np.ones_like(lengths), "tokens": lengths, "responses": responses}
    counts = {
        name: {what: int(values[labels == a].sum()) for what, values in sums.items()} for a, name in enumerate(chunks.alignments)
    }
    return counts, content.hexdigest()[:16]


def _kept_tokens(chunks: Chunks, keep_N: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each chunk with kept records: their number, their tokens and their lengths."""
    for number, path in enumerate(chunks.paths):
        part = slice(chunks.chunk_starts[number], chunks.chunk_starts[number + 1])
        keep = keep_N[part]
        if not keep.any():
            continue
        with np.load(path) as chunk:
            tokens = chunk["tokens"]
        yield int(keep.sum()), tokens[np.repeat(keep, chunks.lengths[part])], chunks.lengths[part][keep].astype(np.int64)
