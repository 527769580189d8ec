"""Matrices of experts in and out of the tensors that hold them, whatever the layout (model/names.py), as runs of bytes.

No values are read here. Only what is stored transposed must be computed; it is read some columns at a time.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import torch

from h3scale.checkpoint.extents import Computed, Extent, Stored, joined
from h3scale.errors import DataError
from h3scale.model import names
from h3scale.model.names import Place

# A column of a matrix is spread over the whole of it: the fewer blocks, the fewer walks over its pages.
TRANSPOSED_BLOCK_BYTES = 2 << 20


def find_layout(model_type: str | None, found: Iterable[str], where: object) -> str | None:
    """The layout that tensors of these names have; None for a dense model.

    DataError (65) when names of several layouts are there, or a mixture of experts has none of any.
    """
    moe = names.MOE.get(model_type or "")
    if moe is None:
        return None
    examples: dict[str, str] = {}
    for name in found:
        for layout, of in moe.layouts.items():
            if layout not in examples and any(names.match(place.template, name) for place in of.experts.values()):
                examples[layout] = name
    if len(examples) > 1:
        shown = ", ".join(f"{name} is {layout}" for layout, name in examples.items())
        raise DataError(f"{where}: experts in several layouts: {shown} (works: one layout for all)")
    if not examples:
        raise DataError(
            f"{where}: config.json says '{model_type}', but no tensor is an expert of it (works: {', '.join(moe.layouts)})"
        )
    return next(iter(examples))


def matrix(tensor: Stored, place: Place, expert: int, num_experts: int, transposed: bool = False) -> Stored | Computed:
    """An expert's projection (out, in), or (in, out) when `transposed`, in the tensor that holds it."""
    all_rows = tensor.viewed((prod(tensor.shape[:-1]), tensor.shape[-1]))
    per_expert = all_rows.shape[0] // (num_experts if place.is_shared else 1)
    rows = per_expert // place.parts
    start = (expert * per_expert if place.is_shared else 0) + place.part * rows
    found = all_rows.rows(start, start + rows)
    return transpose(found) if place.transposed != transposed else found


def transpose(source: Stored) -> Computed:
    """A stored matrix (rows, columns) as (columns, rows)."""
    rows, columns = source.shape
    return Computed(
        (columns, rows),
        source.dtype,
        {"transposed": source},
        lambda start, stop: read_columns(source, start, stop).t().contiguous(),
        TRANSPOSED_BLOCK_BYTES,
    )


def read_columns(source: Stored, start: int, stop: int) -> torch.Tensor:
    """Columns `start` to `stop` of a matrix, (rows, stop - start); the file is mapped, so that no more is in memory."""
    size = source.dtype.itemsize
    width, first, last = source.shape[1] * size, start * size, stop * size
    target = np.empty((source.shape[0], last - first), dtype=np.uint8)
    at = 0
    for extent in source.extents:
        values = _mapped(extent)
        done = 0
        while done < len(values):
            row, column = divmod(at + done, width)
            if column or len(values) - done < width:  # a part of a row, where files meet
                count = min(width - column, len(values) - done)
                low, high = max(first, column), min(last, column + count)
                if low < high:
                    target[row, low - first : high - first] = values[done + low - column : done + high - column]
            else:
                whole = (len(values) - done) // width
                count = whole * width
                target[row : row + whole] = values[done : done + count].reshape(whole, width)[:, first:last]
            done += count
        at += extent.num_bytes
    return torch.from_numpy(target).view(source.dtype)


def _mapped(extent: Extent) -> np.ndarray:
    if extent.path.stat().st_size < extent.offset + extent.num_bytes:
        raise DataError(f"{extent.path}: ends before byte {extent.offset + extent.num_bytes}")
    return np.memmap(extent.path, np.uint8, "r", extent.offset, (extent.num_bytes,))


def stack(pieces: Sequence[Stored | Computed], shape: tuple[int, ...]) -> Stored | Computed:
    """Matrices one under the other, as a tensor of `shape`; where their dtypes differ, in one that holds all."""
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    stored = [piece for piece in pieces if isinstance(piece, Stored) and piece.dtype == dtype]
    if len(stored) == len(pieces):
        return joined(stored, shape)
    bounds = list(pairwise(accumulate((piece.shape[0] for piece in pieces), initial=0)))

    def rows(start: int, stop: int) -> torch.Tensor:
        cuts = ((max(start, low) - low, min(stop, high) - low, piece) for (low, high), piece in zip(bounds, pieces, strict=True))
        found = [_rows(piece, low, high).to(dtype) for low, high, piece in cuts if low < high]
        return found[0] if len(found) == 1 else torch.cat(found)

    inputs = {
        f"{i}" if key == "" else f"{i} {key}": source
        for i, piece in enumerate(pieces)
        for key, source in (piece.inputs.items() if isinstance(piece, Computed) else {"": piece}.items())
    }
    block_bytes = max((piece.block_bytes or 0 for piece in pieces if isinstance(piece, Computed)), default=0)
    return Computed((bounds[-1][1], *shape[-1:]), dtype, inputs, rows, block_bytes or None)


def _rows(piece: Stored | Computed, start: int, stop: int) -> torch.Tensor:
    return piece.rows(start, stop) if isinstance(piece, Computed) else piece.rows(start, stop).values()
