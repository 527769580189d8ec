"""Files and the memory they are mapped into."""

import mmap
import os
from pathlib import Path
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


def sync(folder: Path) -> None:
    """Makes the folder's files and their names durable."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
