"""Buffers that a thread uses again for every block: to get new memory from the system takes longer than the sums in it."""

import threading
from math import prod

import torch
from torch import Tensor


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
