"""Pages of memory-mapped files."""

import mmap
from typing import Any

import numpy as np


def release(array: Any) -> None:
    """Pages of a memory-mapped array count as this process's memory until they are given back; the file keeps them."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.mode == "c":  # copy on write: what was written would be lost
            return
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
