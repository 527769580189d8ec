"""Random numbers that depend on (seed, tensor, model, place) alone: any block can be drawn by itself, in any order."""

import hashlib

import numpy as np
import torch
from torch import Tensor

_WORDS = 8  # 32-bit numbers that one step of Philox gives


def chances(numel: int, seed: int, name: str, model: str, start: int = 0) -> Tensor:
    """Uniform in [0, 1), fp64, for the values `start` and after of a tensor of a model; multiples of 2^-32."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{model}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    bits.advance(start // _WORDS)
    before = start % _WORDS
    drawn = bits.random_raw(-(-(before + numel) // 2)).view(np.uint32)[before : before + numel]
    return torch.from_numpy(drawn * 2.0**-32)
