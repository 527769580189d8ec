"""The parents of a merge as changes of their base: read row by row from where they lie, in fp32, on the device of the work."""

import math
import mmap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from h3scale.checkpoint.extents import Stored
from h3scale.checkpoint.folder_extents import stored_tensors
from h3scale.errors import DataError
from h3scale.fusion.scratch import Latest, Scratch
from h3scale.fusion.sources import AdapterSource, DenseSource, Source
from h3scale.merge.delta import BLOCK_VALUES, Delta, LowRank, Pair, Unread, dense, rows_of

_SHORT_BYTES = 2
Rows = Callable[[int, int], Tensor]  # fp32 rows of a tensor


@dataclass(frozen=True)
class Parents:
    """A base and what was made of it, by label in the order of the weights."""

    base: DenseSource
    models: Mapping[str, Source]
    device: torch.device
    _mapping: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.models)

    @cached_property
    def stored(self) -> list[dict[str, Stored]]:
        """Of every model the tensors of its own folder; of an adapter none."""
        return [stored_tensors(m.folder) if isinstance(m, DenseSource) else {} for m in self.models.values()]

    @cached_property
    def stored_base(self) -> dict[str, Stored]:
        return stored_tensors(self.base.folder)

    def inputs(self, name: str) -> dict[str, Stored]:
        """What lies in files of one tensor, by label."""
        found = {label: own[name] for label, own in zip(self.labels, self.stored, strict=True) if name in own}
        return {"base": self.stored_base[name]} | found

    def is_changed(self, name: str) -> bool:
        """Whether any parent may have another tensor than the base."""
        return any(not isinstance(m, AdapterSource) or m.changed([name]) for m in self.models.values())

    def spans(self, name: str, num_values: int | None = None) -> Iterator[tuple[int, int]]:
        """First row and last row after it of every block; always the same ones. A vector is one block."""
        shape = self.stored_base[name].shape
        if len(shape) < 2:
            yield 0, shape[0] if shape else 1
            return
        step = max(1, (num_values or BLOCK_VALUES) // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._rows(self.stored_base[name], start, stop)

    def changed_rows(self, name: str, change: Delta, start: int, stop: int) -> Tensor:
        """Rows of the base and a change of it; what they are in is used again for the next ones."""
        stored = self.stored_base[name].rows(start, stop)
        total = self.scratch.take("sum", stored.shape, torch.float32, self.device).copy_(self._mapped(stored))
        if isinstance(change, LowRank):
            return total.addmm_(change.left_OR[start:stop], change.right_RI)
        return total.add_(rows_of(change, start, stop))

    def delta_rows(self, model: int, name: str, start: int, base_rows: Tensor) -> Tensor:
        """Rows of a model less those of the base, from `start` on."""
        own = self.stored[model].get(name)
        if own is not None:
            return self._rows(own, start, start + len(base_rows) if base_rows.dim() else 1).sub_(base_rows)
        change = self.delta(model, name)
        return change.rows(start, start + len(base_rows)) if isinstance(change, LowRank) else dense(change)

    def is_short(self, name: str) -> bool:
        """Whether base and models all have files of their own for it, in 16 bits: fp32 then has room for sums of them."""
        stored = self.inputs(name).values()
        return len(stored) == len(self.labels) + 1 and all(each.dtype.itemsize == _SHORT_BYTES for each in stored)

    def sum_of(self, name: str, numbers: Sequence[float]) -> Rows:
        """Rows of the sum of base and models, each times its number, on the CPU; one pass over each whose number is not 0.

        What rows are in is used again for the next ones.
        """
        terms = [(self._mapped(stored), number) for stored, number in zip(self.inputs(name).values(), numbers, strict=True)]
        terms = sorted(((values, number) for values, number in terms if number), key=lambda term: term[1] != 1)

        def rows(start: int, stop: int) -> Tensor:
            parts = [(values[start:stop] if values.dim() else values, number) for values, number in terms]
            shape = (stop - start, *self.stored_base[name].shape[1:]) if self.stored_base[name].shape else ()
            total, part = (self.scratch.take(use, shape, torch.float32, self.device) for use in ("sum", "part"))
            if not parts:
                return total.zero_().cpu()
            total.copy_(parts[0][0])
            if parts[0][1] != 1:
                total.mul_(parts[0][1])
            for values, number in parts[1:]:
                total.add_(part.copy_(values), alpha=number)  # adding 16 bits to fp32 would convert them into new memory
            return total.cpu()

        return rows

    def delta(self, model: int, name: str) -> Delta:
        """The whole change: of a LoRA adapter its factors, of none where it leaves a matrix as it is; another matrix unread.

        DataError (65) for values that are not finite, of a matrix when those are read.
        """
        source = self.models[self.labels[model]]
        if isinstance(source, AdapterSource):
            return self._factors.get(name, model, partial(self._of_adapter, source, name))  # blocks ask again and again
        stored = self.stored[model][name]
        if len(stored.shape) == 2:
            return Unread(stored.shape, self.device, self._reader(name, stored))
        values = self._whole(stored)
        for start, stop in self.spans(name):
            rows = values[start:stop] if values.dim() else values
            rows.sub_(self.base_rows(name, start, stop))
            if not is_finite(rows):
                raise self.not_finite(name)
        return values

    def _reader(self, name: str, stored: Stored) -> Callable[[slice, slice], Tensor]:
        """Reads parts of a matrix less those of the base."""
        own, base = self._mapped(stored), self._mapped(self.stored_base[name])

        def read(rows: slice, columns: slice) -> Tensor:
            shape = tuple(own[rows, columns].shape)
            values, part = (self.scratch.take(use, shape, torch.float32, self.device) for use in ("change", "part"))
            values.copy_(own[rows, columns]).sub_(part.copy_(base[rows, columns]))
            if not is_finite(values):
                raise self.not_finite(name)
            return values

        return read

    def not_finite(self, name: str) -> DataError:
        """What to say of a merged tensor that has values which are not finite: the parents to blame, else the format."""
        blamed = [source.path for source in (self.base, *self.models.values()) if not source.tensor(name).isfinite().all()]
        if not blamed:
            return DataError(f"{name}: merged values are too large for the number format (works: --dtype float32)")
        return DataError([f"{path}: {name} has values that are not finite (NaN or infinite)" for path in blamed])

    def _of_adapter(self, source: AdapterSource, name: str) -> Delta:
        shape = self.stored_base[name].shape
        if not source.changed([name]):
            if len(shape) != 2:
                return torch.zeros(shape, device=self.device)
            return LowRank(torch.zeros(shape[0], 0, device=self.device), torch.zeros(0, shape[1], device=self.device))
        left_OR, right_RI = source.factors(name)
        if not (is_finite(left_OR) and is_finite(right_RI)):
            raise self.not_finite(name)
        return LowRank(left_OR.to(self.device), right_RI.to(self.device))

    def _rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        rows = stored.rows(start, stop) if stored.shape else stored
        return self._whole(rows)

    def _whole(self, stored: Stored) -> Tensor:
        """A new fp32 tensor of what lies in a mapped file: only its own conversion touches the values."""
        return self._mapped(stored).to(device=self.device, dtype=torch.float32, copy=True)

    def _mapped(self, stored: Stored) -> Tensor:
        """The values where they lie, not to be written to."""
        [extent] = stored.extents or [None]
        if extent is None or extent.num_bytes == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        first, rest = divmod(extent.offset, stored.dtype.itemsize)
        values = self._map(extent.path, stored.dtype, rest)
        return values[first : first + stored.numel].view(stored.shape)

    def _map(self, path: Path, dtype: torch.dtype, rest: int) -> Tensor:
        """A file from byte `rest` on, as values of one format. It asks for no memory: a file may be larger than all there is."""
        key = path, dtype, rest
        with self._mapping:
            if key not in self._maps:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with warnings.catch_warnings():  # torch has no tensors that cannot be written to; nobody writes to these
                    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                    count = (len(mapped) - rest) // dtype.itemsize
                    self._maps[key] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=rest)
            return self._maps[key]

    @cached_property
    def scratch(self) -> Scratch:
        return Scratch()

    @cached_property
    def _factors(self) -> Latest[Delta]:
        return Latest()

    @cached_property
    def _maps(self) -> dict[tuple[Path, torch.dtype, int], Tensor]:
        return {}


def is_finite(block: Tensor) -> bool:
    """Whether all values are; by their sum, which one that is not would spoil, and only then by each."""
    return math.isfinite(float(block.sum(dtype=torch.float32))) or bool(block.isfinite().all())


def stays_finite(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether fp32 values surely are finite once they are in this format: by the sum of their squares. No says nothing."""
    flat = values.reshape(-1)
    squares = float(flat.dot(flat))
    return math.isfinite(squares) and squares < torch.finfo(dtype).max ** 2


@dataclass(frozen=True)
class Changes(Sequence[Delta]):
    """The change of one tensor by every model, read anew each time it is asked for: one is in memory at a time."""

    parents: Parents
    name: str

    def __len__(self) -> int:
        return len(self.parents.labels)

    @overload
    def __getitem__(self, index: int) -> Delta: ...
    @overload
    def __getitem__(self, index: slice) -> list[Delta]: ...
    def __getitem__(self, index: int | slice) -> Delta | list[Delta]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.parents.delta(index, self.name)


@dataclass(frozen=True)
class Streamed:
    """Tensors of the parents one after another, in blocks (see merge.delta.Blocks)."""

    parents: Parents
    names: tuple[str, ...]

    @cached_property
    def numel(self) -> int:
        return sum(self.parents.stored_base[name].numel for name in self.names)

    def delta(self, model: int) -> Iterator[Tensor]:
        """The change by one model."""
        for name, start, stop in self._spans():
            yield self.parents.delta_rows(model, name, start, self.parents.base_rows(name, start, stop))

    def pairs(self) -> Iterator[Pair]:
        """The base, and the changes by all models."""
        for name, start, stop in self._spans():
            base = self.parents.base_rows(name, start, stop)
            yield base, [self.parents.delta_rows(model, name, start, base) for model in range(len(self.parents.labels))]

    def _spans(self) -> Iterator[tuple[str, int, int]]:
        return ((name, start, stop) for name in self.names for start, stop in self.parents.spans(name))
