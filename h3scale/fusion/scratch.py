"""What a thread keeps from one block of a tensor to the next: buffers, since to get new memory from the system takes longer than
the sums in it, and what was made for the whole tensor.
"""

import threading
from collections.abc import Callable
from math import prod
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Scratch(threading.local):
    """Buffers by what they are for. What is taken is good until the same thread takes it for the same use again."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Room for values of this shape; what it holds is left over from before."""
        numel, held = prod(shape), self._held.get(use)
        if held is None or held.numel() < numel or held.dtype != dtype:
            held = self._held[use] = torch.empty(numel, dtype=dtype, device=device)
        return held[:numel].view(shape)


class Latest(threading.local, Generic[Made]):
    """What a thread has made for one name, by model; the next name's takes its place, so that it never holds more."""

    def __init__(self) -> None:
        self._name = ""
        self._made: dict[int, Made] = {}

    def get(self, name: str, model: int, make: Callable[[], Made]) -> Made:
        """What there is, or what `make` gives."""
        if name != self._name:
            self._made.clear()
            self._name = name
        if model not in self._made:
            self._made[model] = make()
        return self._made[model]
