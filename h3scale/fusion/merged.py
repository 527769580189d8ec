"""Merged tensors as something to be written: made block by block when their turn comes, within a bound of memory."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from h3scale.checkpoint.extents import Computed, Stored
from h3scale.config.merge import Options, Ties
from h3scale.fusion.parents import Changes, Parents, Rows, Streamed, is_finite, stays_finite
from h3scale.merge.delta import BLOCK_VALUES, Site, dense, rows_of
from h3scale.merge.registry import METHODS, merged_delta
from h3scale.merge.select import HELD

MOST_BYTES = 512 << 20  # that thresholds of tensors may take together
_TENSORS = 4  # of the largest tensor's size: what whole matrices may take together, if that is more
_BYTES_HELD = 4  # of a value that a threshold is looked for among
_SUM_VALUES = 1 << 19  # of a sum, made at a time
_ROUNDING = 2.0**-48  # shares that add up to 1 leave so little, which is no share of the base


class Budget:
    """Bytes that several threads may hold together; one that wants more than all of them gets its turn alone."""

    def __init__(self, num_bytes: int):
        self.num_bytes, self.held = num_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Waits for room, then has it."""
        with self._changed:
            self._changed.wait_for(lambda: not self.held or self.held + num_bytes <= self.num_bytes)
            self.held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self.held -= num_bytes
                self._changed.notify_all()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, torch works as in the writer's threads: products that two make may round otherwise, which thresholds see."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@dataclass(frozen=True)
class Merger:
    """A method on given parents. `names`: the tensors that are merged, which `scope: model` looks at together.

    `alone`: rows are the merged change without the base.
    """

    parents: Parents
    method: str
    options: Options
    names: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    alone: bool = False

    def source(self, name: str, dtype: torch.dtype) -> Stored | Computed:
        """What a merged tensor is made of: the base's own bytes where nothing changes."""
        stored = self.parents.stored_base[name]
        if self.options.scaling == 0 or not self.parents.is_changed(name):
            return stored
        return Merged(stored.shape, dtype, self.parents.inputs(name), partial(self.rows_of, name), merger=self, name=name)

    def rows_of(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a merged tensor, fp32 on the CPU, made for these alone."""
        with self.made(name) as rows:
            return rows(start, stop).clone()

    @contextmanager
    def made(self, name: str) -> Iterator[Rows]:
        """Within, rows of the tensor can be asked for; what all of them need has been found out."""
        if self._is_whole(name):
            with self.budget.hold(self._num_bytes(name)):
                yield self._whole(name)
        elif self._is_sum(name):
            assert self._numbers is not None
            yield self.parents.sum_of(name, self._numbers)
        else:
            with self.budget.hold(_BYTES_HELD * min(self.parents.stored_base[name].numel, HELD)):
                facts = self._facts(name)
            yield partial(self._rows, name, facts)

    def prepare(self) -> None:
        """Finds out what is to be known of all tensors together, before threads ask for it."""
        if self.parents.device.type == "cuda":
            # torch loads the library of all its decompositions at the first of them, and two threads must not do so (pytorch#90613)
            torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=self.parents.device))
        with _one_thread():
            _ = self.budget, self._model_facts

    @cached_property
    def budget(self) -> Budget:
        if not METHODS[self.method].on_matrices:
            return Budget(MOST_BYTES)
        stored = [self.parents.stored_base[name] for name in self.names]
        largest = max((each.numel * each.dtype.itemsize for each in stored), default=0)
        return Budget(max(MOST_BYTES, _TENSORS * largest))

    def _is_whole(self, name: str) -> bool:
        method, shape = METHODS[self.method], self.parents.stored_base[name].shape
        return method.on_matrices and method.takes(shape, self.options, name in self.embeddings)

    def _is_sum(self, name: str) -> bool:
        """Whether it is made of base and models themselves, without their changes."""
        return self._numbers is not None and not self._is_whole(name) and self.parents.is_short(name)

    def num_values(self, name: str) -> int:
        """How many are made at a time: of sums more, since there are two blocks of them in memory instead of one a model."""
        return _SUM_VALUES if self._is_sum(name) else BLOCK_VALUES

    def _num_bytes(self, name: str) -> int:
        return METHODS[self.method].num_bytes(self.parents.stored_base[name].shape, len(self.parents.labels))

    def _whole(self, name: str) -> Rows:
        stored = self.parents.stored_base[name]
        like = torch.empty(stored.shape, device="meta")  # methods on matrices look at changes only
        change = merged_delta(self.method, like, Changes(self.parents, name), self.options, self._site(name, None))

        def rows(start: int, stop: int) -> Tensor:
            if not self.alone:
                return self.parents.changed_rows(name, change, start, stop).cpu()
            return rows_of(change, start, stop).cpu()

        return rows

    @cached_property
    def _numbers(self) -> tuple[float, ...] | None:
        """What base and models are multiplied by, of methods that do nothing else: their changes need not be made."""
        numbers_of = METHODS[self.method].numbers
        if numbers_of is None or self.alone:
            return None
        numbers = [number * self.options.scaling for number in numbers_of(self.options.weights_of(len(self.parents.labels)))]
        left = 1 - math.fsum(numbers)
        return (left if abs(left) > _ROUNDING else 0.0, *numbers)

    def _rows(self, name: str, facts: Any, start: int, stop: int) -> Tensor:
        base = self.parents.base_rows(name, start, stop)
        deltas = [self.parents.delta_rows(model, name, start, base) for model in range(len(self.parents.labels))]
        first = start * prod(self.parents.stored_base[name].shape[1:])
        site = self._site(name, facts, first)
        change = dense(merged_delta(self.method, base, deltas, self.options, site, name in self.embeddings))
        return (change if self.alone else base.add_(change)).cpu()

    def _site(self, name: str, facts: Any, start: int = 0) -> Site:
        return Site(name, self.parents.labels, start, facts)

    def _facts(self, name: str) -> Any:
        if self._model_facts is not None:
            return self._model_facts
        return self._surveyed((name,))

    @cached_property
    def _model_facts(self) -> Any:
        is_wide = isinstance(self.options, Ties) and self.options.scope == "model"
        return self._surveyed(self.names) if is_wide else None

    def _surveyed(self, names: Sequence[str]) -> Any:
        survey = METHODS[self.method].survey
        weights = self.options.weights_of(len(self.parents.labels))
        return survey(Streamed(self.parents, tuple(names)), self.options, weights) if survey else None


@dataclass(frozen=True, kw_only=True)
class Merged(Computed):
    """A merged tensor. DataError (65) from `blocks` for values that are not finite."""

    merger: Merger
    name: str

    def blocks(self) -> Iterator[Tensor]:
        """All rows in the blocks of the work, so that what is found out about the whole is found out once.

        A block's memory is used again for the next.
        """
        parents = self.merger.parents
        with self.merger.made(self.name) as rows:
            for start, stop in parents.spans(self.name, self.merger.num_values(self.name)):
                values = rows(start, stop)
                block = parents.scratch.take("block", tuple(values.shape), self.dtype).copy_(values)
                if not (stays_finite(values, self.dtype) or is_finite(block)):
                    raise parents.not_finite(self.name)
                yield block

    def values(self) -> Tensor:
        """The whole tensor."""
        return torch.cat([block.clone() for block in self.blocks()])
