"""The exact n-th largest magnitude, by partition instead of sorting, in memory that a model's size does not matter to.

Up to `HELD` values are held and partitioned. More are counted by the upper half of their bits, then, among those whose upper
half is the one looked for, by the lower half: magnitudes of fp32 are ordered as their bits are.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

HELD = 1 << 26  # values: 256 MiB
_HALF_BITS = 16


def largest(blocks: Callable[[], Iterator[Tensor]], numel: int, count: int, held: int = HELD) -> float:
    """The `count`-th largest magnitude (1: the largest) of so many fp32 values; `blocks` may be asked for them twice.

    Infinity for a count of 0: nothing reaches it.
    """
    if count <= 0:
        return float("inf")
    if numel > held:
        return _counted(blocks, count)
    values = np.empty(numel, dtype=np.float32)
    done = 0
    for block in blocks():
        values[done : done + block.numel()] = block.reshape(-1).cpu().numpy()
        done += block.numel()
    np.abs(values, out=values)
    values.partition(numel - count)
    return float(values[numel - count])


def _counted(blocks: Callable[[], Iterator[Tensor]], count: int) -> float:
    upper, left = _from_the_top((high for _, high in map(_halves, blocks())), count)
    lower, _ = _from_the_top((low[high == upper] for low, high in map(_halves, blocks())), left)
    return float(np.array([upper << _HALF_BITS | lower], dtype=np.uint32).view(np.float32)[0])


def _halves(block: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper half of the bits of every magnitude."""
    bits = block.abs().reshape(-1).cpu().contiguous().numpy().view(np.uint32)
    return (bits & (1 << _HALF_BITS) - 1).astype(np.uint16), (bits >> _HALF_BITS).astype(np.uint16)


def _from_the_top(halves: Iterator[np.ndarray], count: int) -> tuple[int, int]:
    """Which half the `count`-th largest has, and which of those that have it it is."""
    counts = np.zeros(1 << _HALF_BITS, dtype=np.int64)
    for block in halves:
        counts += np.bincount(block, minlength=len(counts))
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, count))
    return len(counts) - 1 - place, count - int(above[place - 1] if place else 0)
