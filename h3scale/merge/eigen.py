"""Eigenvectors of symmetric matrices, on a CPU by LAPACK: only as many as are asked for are made, in half of eigh's memory.

LAPACK's own drivers turn all vectors back to the matrix (syevd, which torch and numpy call), or find some of them by inverse
iteration (syevr), which takes longer. Here are syevd's three steps: the matrix becomes tridiagonal (sytrd), that is decomposed by
divide and conquer (stedc), and the vectors that are wanted are turned back (ormtr). They are those of scipy's LAPACK, by the
pointers that it exports for other languages, since scipy's own wrappers keep other threads waiting.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from scipy.linalg import cython_lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from h3scale.errors import ConfigError

MOST = 46_338  # rows: LAPACK counts its room, some more than a square, in 32 bits
_FEW = 32  # rows, for which three calls take longer than torch's one
_SPAN = 64  # columns that LAPACK's blocked steps are given room for


def eigh(matrix_SS: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """All eigenvalues, the least first, and the vectors (columns) of the `count` largest, fp64. The matrix is used up.

    What is above its diagonal is not looked at. On a CPU at most 24 bytes an entry at the peak, 8 of them the matrix. ConfigError
    (78) for one that is too large, torch.linalg.LinAlgError where no vectors are found, as with values that are not finite.
    """
    size = len(matrix_SS)
    assert (matrix_SS.dtype, matrix_SS.shape) == (torch.float64, (size, size))
    assert matrix_SS.is_contiguous()
    count = size if count is None else min(count, size)
    if size > MOST and matrix_SS.device.type == "cpu":
        raise ConfigError(f"a matrix with {size:,} rows to be decomposed (works: {MOST:,} at most, or another method)")
    is_plain = matrix_SS.device.type != "cpu" or not count or size <= _FEW
    values_S, vectors_SK = _plain(matrix_SS, count) if is_plain else _by_steps(matrix_SS, count)
    if not values_S.isfinite().all():
        raise torch.linalg.LinAlgError("eigenvalues that are not finite")
    return values_S, vectors_SK


def _plain(matrix_SS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values_S, vectors_SS = torch.linalg.eigh(matrix_SS)
    return values_S, vectors_SS[:, len(matrix_SS) - count :]


def _by_steps(matrix_SS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = len(matrix_SS)
    values_S, off_S, scales_S = matrix_SS.new_empty(3, size).unbind()
    room = matrix_SS.new_empty(_SPAN * size)
    _call("dsytrd", b"U", size, matrix_SS, size, values_S, off_S, scales_S, room, len(room))
    vectors_SS = _of_tridiagonal(values_S, off_S)
    vectors_KS = vectors_SS[size - count :]  # what are columns to LAPACK are rows here
    room = matrix_SS.new_empty(_SPAN * (count + _SPAN))
    _call("dormtr", b"L", b"U", b"N", size, count, matrix_SS, size, scales_S, vectors_KS, size, room, len(room))
    return values_S, vectors_KS.T


def _of_tridiagonal(values_S: Tensor, off_S: Tensor) -> Tensor:
    """All eigenvectors, as rows, of the matrix with this diagonal and this one beside it. Its eigenvalues replace the diagonal."""
    size = len(values_S)
    vectors_SS = values_S.new_empty(size, size)
    room, places = values_S.new_empty(1 + 4 * size + size * size), values_S.new_empty(3 + 5 * size, dtype=torch.int64)
    _call("dstedc", b"I", size, values_S, off_S, vectors_SS, size, room, len(room), places, len(places))
    return vectors_SS


def _call(name: str, *arguments: bytes | int | Tensor) -> None:
    """A routine of LAPACK with all arguments but the last, by which it says how it went."""
    status = ctypes.c_int64()
    boxes = [_boxed(each) for each in arguments]
    _routine(name)(*(box if isinstance(box, int) else ctypes.addressof(box) for box in boxes), ctypes.addressof(status))
    if status.value:
        raise torch.linalg.LinAlgError(f"LAPACK's {name}: {ctypes.c_int32(status.value).value}")


def _boxed(argument: bytes | int | Tensor) -> "int | ctypes.c_int64 | ctypes.c_char":
    """Where LAPACK finds it: everything goes by its address. Whole numbers have 64 bits, of which some builds read the first 32."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_char(argument)


@cache
def _routine(name: str) -> Callable[..., None]:
    """LAPACK's, which from then on works in the thread that calls it: threads of its own round otherwise, and are in our way."""
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = name_of(capsule)
    assert signature is not None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))(pointer_of(capsule, signature))
