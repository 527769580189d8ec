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
FP64_VALUES = 1 << 26  # singular vectors of the longer side with more values than this are kept in fp32
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
    numel = matrix_SL.shape[1] * len(values_K)
    long_LK = torch.empty(
        matrix_SL.shape[1], len(values_K), dtype=torch.float64 if numel <= FP64_VALUES else torch.float32, device=delta.device
    )
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
    left_OK, right_IK = _side_by_side([p.left_OK for p in parts]), _side_by_side([p.right_IK for p in parts])
    values_K = torch.cat([part.values_K for part in parts]) if values_K is None else values_K
    core_KK = _inverse_root(gram(left_OK.T)) * values_K @ _inverse_root(gram(right_IK.T))
    if left_OK.shape[0] <= right_IK.shape[0]:
        return product(left_OK.double() @ core_KK, right_IK)
    return product(left_OK, right_IK.double() @ core_KK.T)


def product(left_OK: Tensor, right_IK: Tensor) -> Delta:
    """left right^T in fp32; as factors when those are smaller."""
    (rows, rank), columns = left_OK.shape, right_IK.shape[0]
    if rank * (rows + columns) < rows * columns:
        return LowRank(left_OK.float(), right_IK.T.float())
    merged_OI = torch.empty(rows, columns, dtype=torch.float32, device=left_OK.device)
    if rows <= columns:
        for part in _chunks(columns):
            merged_OI[:, part] = (left_OK.double() @ right_IK[part].double().T).float()
    else:
        right_KI = right_IK.double().T
        for part in _chunks(rows):
            merged_OI[part] = (left_OK[part].double() @ right_KI).float()
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


def _side_by_side(parts: list[Tensor]) -> Tensor:
    dtype = torch.float64 if all(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.cat([part.to(dtype) for part in parts], dim=1)


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))
