"""The header of a safetensors file, read strictly: what it says of its tensors, and all that is wrong with it.

safetensors' own reader stops at the first mistake and takes the last of two entries with one name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from h3scale.checkpoint.extents import Extent, Stored
from h3scale.checkpoint.findings import Finding, error, unsafe
from h3scale.checkpoint.inside import is_plain
from h3scale.checkpoint.shard_files import DTYPES, MAX_HEADER_BYTES

_LENGTH_BYTES = 8


@dataclass
class Header:
    """Where the tensors of a file are. Those that cannot be read are left out, and `findings` says why."""

    path: Path
    tensors: dict[str, Stored] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def read_header(path: Path) -> Header:
    """The header of a file; no value is read, and no more than the header into memory."""
    header = Header(path)
    length, size = 0, path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            header.findings.append(error(f"{path}: cut off, or no safetensors file ({size} bytes; its header would have {length})"))
            return header
        if length > MAX_HEADER_BYTES:
            header.findings.append(error(f"{path}: a header of {length} bytes (works: {MAX_HEADER_BYTES} at most)"))
            return header
        text = file.read(length)
    try:
        pairs = json.loads(text.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as raised:
        header.findings.append(error(f"{path}: its header is no JSON ({raised})"))
        return header
    if not isinstance(pairs, _Pairs):
        header.findings.append(error(f"{path}: its header is no JSON object"))
        return header
    _read_entries(header, pairs, _LENGTH_BYTES + length)
    header.findings += _holes(header, _LENGTH_BYTES + length, size)
    return header


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its pairs, the second one of a name too."""


def _read_entries(header: Header, pairs: _Pairs, start: int) -> None:
    seen: set[str] = set()
    for name, entry in pairs:
        if name in seen:
            header.findings.append(error(f"{header.path}: its header names {name} twice (a duplicate)"))
        elif name != "__metadata__" and not is_plain(name):
            header.findings.append(unsafe(f"{header.path}: holds a tensor of the name {name!r}, which is a path"))
        elif name != "__metadata__":
            found = _stored(header.path, entry, start)
            if found is None:
                header.findings.append(error(f"{header.path}: its header says of {name} what cannot be: {_short(entry)}"))
            else:
                header.tensors[name] = found
        seen.add(name)


def _stored(path: Path, entry: object, start: int) -> Stored | None:
    """Where a tensor is; None where dtype, shape and offsets do not fit together."""
    known = dict(entry) if isinstance(entry, _Pairs) else {}
    dtype = DTYPES.get(str(known.get("dtype")))
    shape, offsets = _counts(known.get("shape")), _counts(known.get("data_offsets"))
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        return None
    first, end = offsets
    if end - first != prod(shape) * dtype.itemsize:
        return None
    extents = (Extent(path, start + first, end - first),) if end > first else ()
    return Stored(tuple(shape), dtype, extents)


def _counts(values: object) -> list[int] | None:
    """A list of sizes or offsets; None for anything else."""
    return values if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values) else None


def _holes(header: Header, start: int, size: int) -> Iterator[Finding]:
    """The tensors must lie one after another from the header to the end of the file."""
    done, before = start, "the header"
    runs = sorted((extent.offset, extent.num_bytes, name) for name, t in header.tensors.items() for extent in t.extents)
    for offset, num_bytes, name in runs:
        if offset < done:
            yield error(f"{header.path}: the bytes of {before} and of {name} overlap")
        elif offset > done and not header.findings:  # else they may be those of a tensor that could not be read
            yield error(f"{header.path}: {offset - done} bytes between {before} and {name} belong to no tensor")
        done, before = max(done, offset + num_bytes), name
    if done > size:
        yield error(f"{header.path}: cut off: {size} bytes, its header says {done}")
    elif done < size and not header.findings:
        yield error(f"{header.path}: {size - done} bytes after the last tensor belong to none")


def _short(entry: object) -> str:
    return json.dumps(dict(entry) if isinstance(entry, _Pairs) else entry)[:120]
