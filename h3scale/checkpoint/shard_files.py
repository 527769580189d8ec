"""Safetensors files before they are written: which tensor goes into which file, at which byte, and the header that says so."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from h3scale.errors import DataError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_ALIGNMENT = 8  # of the first value, in bytes
METADATA = {"format": "pt"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, shape and dtype are known before its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


@dataclass(frozen=True)
class ShardFile:
    """One file and the tensors in it, in their order: the widest numbers first, so that all are aligned."""

    name: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": METADATA}
        for spec, start in zip(self.specs, self._starts, strict=True):
            offsets = [start, start + spec.num_bytes]
            entries[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The byte of the file at which each tensor begins."""
        return {spec.name: len(self.header) + start for spec, start in zip(self.specs, self._starts, strict=True)}

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)

    @cached_property
    def _starts(self) -> list[int]:
        starts, done = [], 0
        for spec in self.specs:
            starts.append(done)
            done += spec.num_bytes
        return starts


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[ShardFile]:
    """Tensors in their order over files of at most so many bytes of values, or of one tensor that is larger."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))] if len(groups) > 1 else [WEIGHTS]
    by_width = [tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize)) for group in groups]
    return [ShardFile(name, group) for name, group in zip(names, by_width, strict=True)]


def index_of(shards: Sequence[ShardFile]) -> dict[str, Any] | None:
    """The index of several files, as Hugging Face writes it; None for a single one, which has none."""
    if len(shards) == 1:
        return None
    total = sum(spec.num_bytes for shard in shards for spec in shard.specs)
    return {"metadata": {"total_size": total}, "weight_map": {spec.name: shard.name for shard in shards for spec in shard.specs}}


def header_of(path: Path) -> bytes:
    """The bytes of a file that stand before the values; what is shorter than it says is given as far as it goes."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))


def entries_of(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """The tensors of a file, and the byte at which each begins. DataError (65) for a file that safetensors does not open."""
    try:
        # Checks the header: no holes, no overlaps, as long as the file. For torch it would ask for memory for all of the file.
        with safe_open(path, framework="np"):
            pass
        header = header_of(path)
        entries = json.loads(header[8:], object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        return {
            name: (TensorSpec(name, tuple(entry["shape"]), DTYPES[entry["dtype"]]), len(header) + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except KeyError as error:
        raise DataError(f"{path}: numbers of the format {error} are not read (works: {', '.join(DTYPES)})") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for json's `object_pairs_hook`; ValueError where a key is there twice: readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{twice}' is there twice, a duplicate")
    return found
