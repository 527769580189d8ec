"""Singular triplets of one matrix, and of several made orthogonal together: by fp64 Gram matrix and eigh of the short side.

Gram matrices square the singular values, so that those below some 1e-7 of the largest are lost: they are taken as 0. Factored
matrices (LoRA) are decomposed by their factors; their entries are never made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from h3scale.merge.delta import Delta, LowRank

CHUNK = 1024  # columns of the longer side that are worked on in fp64 at a time
LONG = 4  # singular vectors so many times longer than there are of them are far from dependent, and kept in fp32
NULL = 1e-12  # a share of the largest eigenvalue: directions below it are noise of fp64


@dataclass(frozen=True)
class Triplets:
    """Singular vectors and values, the largest first; values of 0 are left out, so there may be fewer than asked for."""

    left_OK: Tensor
    values_K: Tensor
    right_IK: Tensor

    def scaled(self, weight: float) -> "Triplets":
        """Of the same matrix, times a weight."""
        return Triplets(self.left_OK, self.values_K * weight, self.right_IK)

    def above(self, least: float) -> "Triplets":
        """Those with larger singular values."""
        kept = int((self.values_K > least).sum())
        return Triplets(self.left_OK[:, :kept], self.values_K[:kept], self.right_IK[:, :kept])


def top_triplets(delta: Delta, count: int) -> Triplets:
    """The `count` largest singular triplets, fp64 (long vectors of large matrices fp32)."""
    if isinstance(delta, LowRank):
        return _of_factors(delta, count)
    is_tall = delta.shape[0] > delta.shape[1]
    matrix_SL = delta.T if is_tall else delta
    values_K, short_SK = _short_side(gram(matrix_SL), count)
    size, dtype = matrix_SL.shape[1], torch.float64 if matrix_SL.shape[1] <= LONG * matrix_SL.shape[0] else torch.float32
    long_LK = torch.empty(size, len(values_K), dtype=dtype, device=delta.device)
    unscaled_SK = short_SK / values_K
    for columns in _chunks(matrix_SL.shape[1]):
        long_LK[columns] = (matrix_SL[:, columns].double().T @ unscaled_SK).to(long_LK.dtype)
    return Triplets(long_LK, values_K, short_SK) if is_tall else Triplets(short_SK, values_K, long_LK)


def gram(matrix_SL: Tensor) -> Tensor:
    """M M^T in fp64."""
    total_SS = torch.zeros(matrix_SL.shape[0], matrix_SL.shape[0], dtype=torch.float64, device=matrix_SL.device)
    for columns in _chunks(matrix_SL.shape[1]):
        part_SC = matrix_SL[:, columns].double()
        total_SS.addmm_(part_SC, part_SC.T)
    return total_SS


def orthogonal_together(parts: Sequence[Triplets], values_K: Tensor | None = None) -> Delta:
    """U' diag(values) V'^T, where U' and V' are the nearest orthonormal columns to all left and right vectors side by side.

    With C = U^T U, U' = U C^-1/2 (the polar factor), so that all that is decomposed is K x K. Directions that are not there
    (C's eigenvalue is 0, as with two equal models) are left out of U'; the published codes fill them with whatever vectors
    their SVD returns. `values_K` takes the place of the parts' own. fp32; factors when those are smaller than the matrix.
    """
    lefts, rights = [part.left_OK for part in parts], [part.right_IK for part in parts]
    values_K = torch.cat([part.values_K for part in parts]) if values_K is None else values_K
    core_KK = _inverse_root(_gram_of_columns(lefts)) * values_K @ _inverse_root(_gram_of_columns(rights))
    if lefts[0].shape[0] <= rights[0].shape[0]:
        return product([_rows(lefts) @ core_KK], rights)
    return product(lefts, [_rows(rights) @ core_KK.T])


def product(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Delta:
    """left right^T in fp32, of columns side by side; as factors when those are smaller. The longer side is never put together."""
    rows, columns, rank = lefts[0].shape[0], rights[0].shape[0], sum(right.shape[1] for right in rights)
    if rank * (rows + columns) < rows * columns:
        return LowRank(_rows(lefts).float(), _rows(rights).T.float())
    merged_OI = torch.empty(rows, columns, dtype=torch.float32, device=lefts[0].device)
    if rows <= columns:
        left_OK = _rows(lefts)
        for part in _chunks(columns):
            merged_OI[:, part] = (left_OK @ _rows(rights, part).T).float()
    else:
        right_KI = _rows(rights).T
        for part in _chunks(rows):
            merged_OI[part] = (_rows(lefts, part) @ right_KI).float()
    return merged_OI


def largest_rank(delta: Delta) -> int:
    """How many singular values a matrix of this shape has."""
    return min(delta.shape)


def _short_side(gram_SS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their vectors, from a Gram matrix."""
    squares_S, vectors_SS = torch.linalg.eigh(gram_SS)
    squares_S, vectors_SS = squares_S.flip(0)[:count], vectors_SS.flip(1)[:, :count]
    noise = float(gram_SS.trace().abs()) * len(gram_SS) * torch.finfo(torch.float64).eps
    kept = int((squares_S > noise).sum())
    return squares_S[:kept].sqrt(), vectors_SS[:, :kept].contiguous()


def _of_factors(delta: LowRank, count: int) -> Triplets:
    left_OR, left_RR = torch.linalg.qr(delta.left_OR.double())
    right_IR, right_RR = torch.linalg.qr(delta.right_RI.double().T)
    u_RK, values_K, v_KR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    noise = float(values_K[:1].sum()) * max(delta.shape) * torch.finfo(torch.float64).eps
    kept = min(count, int((values_K > noise).sum()))
    return Triplets(left_OR @ u_RK[:, :kept], values_K[:kept], right_IR @ v_KR[:kept].T)


def _inverse_root(gram_KK: Tensor) -> Tensor:
    """C^-1/2 on the directions that are there."""
    squares_K, vectors_KK = torch.linalg.eigh(gram_KK)
    there_K = squares_K > NULL * squares_K[-1:]
    roots_K = torch.where(there_K, squares_K.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return vectors_KK * roots_K @ vectors_KK.T


def _gram_of_columns(parts: Sequence[Tensor]) -> Tensor:
    """U^T U in fp64, of columns side by side."""
    rank = sum(part.shape[1] for part in parts)
    total_KK = torch.zeros(rank, rank, dtype=torch.float64, device=parts[0].device)
    for rows in _chunks(parts[0].shape[0]):
        part_CK = _rows(parts, rows)
        total_KK.addmm_(part_CK.T, part_CK)
    return total_KK


def _rows(parts: Sequence[Tensor], rows: slice = slice(None)) -> Tensor:
    """Rows of columns side by side, fp64."""
    return torch.cat([part[rows].double() for part in parts], dim=1)


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))
