"""What a method gets: the changes of one tensor, model by model, dense or as factors, and where in the models they are.

Shape suffixes in this package: O rows (outputs) and I columns (inputs) of a matrix, X whatever shape a tensor has, R rank of a
factored change, K singular triplets, S and L the shorter and the longer side, M models. Values are fp32, Gram matrices and all
that is decomposed fp64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK_VALUES = 1 << 17  # what is worked on at a time: so many values of all models stay in the processor's cache

_TILE = (
    256  # columns of a product that is looked at in blocks: its rows are then no large power of 2 apart, which caches cannot hold
)


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right without its entries: what a LoRA adapter changes, and what comes of a few of them."""

    left_OR: Tensor
    right_RI: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left_OR.shape[0], self.right_RI.shape[1])

    @property
    def rank(self) -> int:
        return self.left_OR.shape[1]

    @property
    def device(self) -> torch.device:
        return self.left_OR.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the product."""
        return self.left_OR[start:stop] @ self.right_RI

    def dense(self) -> Tensor:
        return self.left_OR @ self.right_RI


@dataclass(frozen=True)
class Unread:
    """A matrix that is in files and never whole in memory. `read`: rows and columns of it, good until the next are asked for."""

    shape: tuple[int, ...]
    device: torch.device
    read: Callable[[slice, slice], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read(slice(start, stop), slice(None))

    def dense(self) -> Tensor:
        values_OI = torch.empty(self.shape, device=self.device)
        step = max(1, BLOCK_VALUES // max(self.shape[1], 1))
        for start in range(0, self.shape[0], step):
            values_OI[start : start + step] = self.rows(start, start + step)
        return values_OI


Delta = Tensor | LowRank | Unread
Pair = tuple[Tensor, list[Tensor]]  # a base and the deltas of all models, or blocks of them


class Blocks(Protocol):
    """One tensor, or a model's tensors one after another, in blocks that can be asked for again."""

    @property
    def numel(self) -> int: ...

    def delta(self, model: int) -> Iterator[Tensor]:
        """The delta of one model."""

    def pairs(self) -> Iterator[Pair]:
        """The base, and the deltas of all models."""


@dataclass(frozen=True)
class Whole:
    """Values in memory as blocks: there is one."""

    base_X: Tensor
    deltas: Sequence[Delta]

    @property
    def numel(self) -> int:
        return math.prod(self.base_X.shape)

    def delta(self, model: int) -> Iterator[Tensor]:
        yield dense(self.deltas[model])

    def pairs(self) -> Iterator[Pair]:
        yield self.base_X, [dense(delta) for delta in self.deltas]


@dataclass(frozen=True)
class Site:
    """Where a block is: the tensor's name, the models' names, the flat index of its first value.

    `facts` is what the method's survey has found in the whole tensor (or model); None: the block is the whole tensor, and the
    method looks for itself.
    """

    name: str = ""
    models: tuple[str, ...] = ()
    start: int = 0
    facts: Any = field(default=None, compare=False)

    def model(self, index: int) -> str:
        """The name of a model; its number where there are no names."""
        return self.models[index] if self.models else str(index)


Survey = Callable[[Blocks, Any, Sequence[float]], Any]


def dense(delta: Delta) -> Tensor:
    """All entries, fp32 (fp64 stays)."""
    return delta if isinstance(delta, Tensor) else delta.dense()


def rows_of(delta: Delta, start: int, stop: int) -> Tensor:
    """Some of all entries."""
    return delta[start:stop] if isinstance(delta, Tensor) else delta.rows(start, stop)


def magnitudes(delta: Delta) -> Iterator[Tensor]:
    """|entries| laid flat, each once, in a buffer that is used again: to get new memory takes longer than the work."""
    values = delta.left_OR if isinstance(delta, LowRank) else delta
    dtype = values.dtype if isinstance(values, Tensor) else torch.float32
    height, width = math.prod(delta.shape[:1]), math.prod(delta.shape[1:])
    columns = min(width, _TILE) if isinstance(delta, LowRank) else width
    step = min(max(1, BLOCK_VALUES // max(columns, 1)), height)
    buffer = torch.empty(step * columns, dtype=dtype, device=values.device)
    for start in range(0, height, step):
        stop = min(start + step, height)
        if not isinstance(delta, LowRank):
            values_X = rows_of(delta, start, stop) if delta.shape else dense(delta)
            yield torch.abs(values_X.reshape(-1), out=buffer[: values_X.numel()])
            continue
        for right_RT in delta.right_RI.split(columns, dim=1):
            block = buffer[: (stop - start) * right_RT.shape[1]]
            torch.mm(delta.left_OR[start:stop], right_RT, out=block.view(stop - start, -1))
            yield block.abs_()


def length(delta: Delta) -> float:
    """The Frobenius norm, in fp64; of factors without their product."""
    if isinstance(delta, LowRank):
        left_OR, right_RI = delta.left_OR.double(), delta.right_RI.double()
        return math.sqrt(max(float(((left_OR.T @ left_OR) * (right_RI @ right_RI.T)).sum()), 0.0))
    return math.sqrt(math.fsum(float(sizes_X.double().square_().sum()) for sizes_X in magnitudes(delta)))


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The sum of all, with factors side by side where there are nothing but factors."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        left_OR = torch.cat([delta.left_OR * weight for delta, weight in zip(factors, weights, strict=True)], dim=1)
        return LowRank(left_OR, torch.cat([delta.right_RI for delta in factors]))
    total_X: Tensor | None = None
    for delta, weight in zip(deltas, weights, strict=True):
        values_X = dense(delta)
        if total_X is None:
            total_X = values_X * weight if isinstance(delta, Tensor) else values_X.mul_(weight)
        else:
            total_X.add_(values_X, alpha=weight)
        del values_X  # before the next is made
    assert total_X is not None
    return total_X
