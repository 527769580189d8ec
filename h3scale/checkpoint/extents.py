"""Where the bytes of tensors lie in files. A reader of a checkpoint says this and no more; who wants values reads them."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from h3scale.checkpoint.shard_files import TensorSpec
from h3scale.errors import DataError

BLOCK_BYTES = 1 << 20  # what is read, changed and written at a time: it stays in the processor's cache


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of a file."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies on disk: its flat values are the bytes of the extents, one after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: tuple[Extent, ...]

    @classmethod
    def at(cls, path: Path, spec: TensorSpec, offset: int) -> "Stored":
        """A tensor that lies in one piece."""
        return cls(spec.shape, spec.dtype, (Extent(path, offset, spec.num_bytes),) if spec.num_bytes else ())

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    def flat(self, start: int, stop: int) -> "Stored":
        """The values from `start` to `stop` of the tensor laid flat."""
        size = self.dtype.itemsize
        return Stored((stop - start,), self.dtype, tuple(_cut(self.extents, start * size, stop * size)))

    def row(self, index: int) -> "Stored":
        """One entry along the first dimension."""
        return self.rows(index, index + 1).viewed(self.shape[1:])

    def rows(self, start: int, stop: int) -> "Stored":
        """Entries `start` to `stop` along the first dimension."""
        numel = prod(self.shape[1:])
        return self.flat(start * numel, stop * numel).viewed((stop - start, *self.shape[1:]))

    def viewed(self, shape: tuple[int, ...]) -> "Stored":
        """The same values in another shape."""
        return Stored(shape, self.dtype, self.extents)

    def values(self) -> torch.Tensor:
        """The tensor, read now. DataError (65) when a file is shorter than it was."""
        values = torch.empty(self.numel, dtype=self.dtype)
        whole, done = bytes_of(values), 0
        for extent in self.extents:
            with extent.path.open("rb", buffering=0) as file:
                read_into(file.fileno(), whole[done : done + extent.num_bytes], extent.offset, extent.path)
            done += extent.num_bytes
        return values.view(self.shape)

    def sha256(self) -> str:
        """The sha256 of the bytes, read in blocks; of those that are there where a file is shorter than it was."""
        found = hashlib.sha256()
        for extent in self.extents:
            with extent.path.open("rb") as opened:
                opened.seek(extent.offset)
                left = extent.num_bytes
                while left and (block := opened.read(min(BLOCK_BYTES, left))):
                    found.update(block)
                    left -= len(block)
        return found.hexdigest()


@dataclass(frozen=True)
class Computed:
    """A tensor that is made of others, some rows at a time: `rows(start, stop)` along the first dimension.

    `block_bytes`: how much of it is made at a time, where BLOCK_BYTES is not best.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: dict[str, Stored]
    rows: Callable[[int, int], torch.Tensor]
    block_bytes: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows, in blocks of the same sizes whoever asks: matrix products of other sizes may round otherwise."""
        count = max(1, (self.block_bytes or BLOCK_BYTES) // max(prod(self.shape[1:]) * self.dtype.itemsize, 1))
        for start in range(0, self.shape[0], count):
            yield self.rows(start, min(start + count, self.shape[0]))

    def values(self) -> torch.Tensor:
        """The whole tensor."""
        return torch.cat(list(self.blocks()))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's values; a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def joined(parts: Iterable[Stored], shape: tuple[int, ...]) -> Stored:
    """Flat parts one after another, as a tensor of `shape`; what is left over at the end is padding."""
    parts = list(parts)
    extents = [extent for part in parts for extent in part.extents]
    return Stored(shape, parts[0].dtype, tuple(_cut(extents, 0, prod(shape) * parts[0].dtype.itemsize)))


def _cut(extents: Iterable[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The bytes from `start` to `stop` of extents in a row; those that touch become one."""
    last: Extent | None = None
    done = 0
    for extent in extents:
        first, end = max(start - done, 0), min(stop - done, extent.num_bytes)
        done += extent.num_bytes
        if first >= end:
            continue
        piece = Extent(extent.path, extent.offset + first, end - first)
        if last and last.path == piece.path and last.offset + last.num_bytes == piece.offset:
            last = Extent(last.path, last.offset, last.num_bytes + piece.num_bytes)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def read_into(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    """Fills `target` from a place in a file; DataError (65) when the file ends before."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise DataError(f"{path}: ends at byte {offset + done}, where {len(target) - done} more are expected")
        done += count


@dataclass
class Weights:
    """The tensors of a checkpoint, all experts of a layer stacked. `aliases`: tied names that are not stored, and the stored one.

    `kind` says what was read, in words. `is_rounded`: training computed in bf16 or fp16, so that its logits are not those
    of the fp32 weights. `step`: DeepSpeed's count. `shared`: entries that the file itself has as the very bytes of another, and
    of which.
    """

    folder: Path
    kind: str
    world_size: int
    ep_size: int
    is_rounded: bool
    entries: dict[str, Stored]
    aliases: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    shared: dict[str, str] = field(default_factory=dict)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, logical shape and dtype of every tensor that can be asked for; aliases are left out."""
        return {name: TensorSpec(name, entry.shape, entry.dtype) for name, entry in self.entries.items()}

    def source(self, name: str, expert: int | None = None) -> Stored | Computed:
        """What a tensor or alias is made of, or one expert of a stacked tensor."""
        entry = self.entries.get(self.stored_name(name))
        if entry is None:
            raise DataError(f"{self.folder}: has no tensor '{name}'")
        if expert is None:
            return entry
        if not entry.shape or not 0 <= expert < entry.shape[0]:
            raise DataError(f"{self.folder}: {name} {entry.shape} has no expert {expert}")
        return entry.row(expert)

    def stored_name(self, name: str) -> str:
        """The name under which the values of a tensor are: its own, or for a tied one the other's."""
        return name if name in self.entries else self.aliases.get(name, name)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of one tensor or alias in its logical shape."""
        return self.source(name).values()

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert of a stacked tensor; only its values are read."""
        return self.source(name, expert).values()
