"""Singular triplets of one matrix, and of several made orthogonal together: by fp64 Gram matrix and eigh of the short side.

Gram matrices square the singular values, so that those below some 1e-7 of the largest are lost: they are taken as 0. Factored
matrices (LoRA) are decomposed by their factors; their entries are never made.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

import torch
from torch import Tensor

from h3scale.merge.delta import Delta, LowRank, Unread
from h3scale.merge.eigen import eigh

CHUNK = 512  # columns of the longer side that are worked on in fp64 at a time
BLOCK = 128  # rows of a Gram matrix that are made at a time: what lies above its diagonal is known from below
LONG = 4  # singular vectors more than so many times longer than there are of them are far from dependent, and kept in fp32
LARGE = 1 << 24  # values of a matrix from which on half of that will do, for the memory
FREE = 2  # in matrices so many times longer than wide models that differ have long vectors far from dependent
FAR = 1e-2  # least eigenvalue of C for a product in fp32: its rounding is 1e-7 of the result, divided by the root of this
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


def top_triplets(delta: Delta, count: int, room_KL: Tensor | None = None) -> Triplets:
    """The `count` largest singular triplets, fp64 (long vectors of large matrices fp32); `room_KL` is where those are put."""
    if isinstance(delta, LowRank):
        return _of_factors(delta, count)
    if not count:
        return _none_of(delta)
    is_tall = delta.shape[0] > delta.shape[1]
    values_K, short_SK = _short_side(gram(delta), count)
    long_KL = (_room(delta, count) if room_KL is None else room_KL)[: len(values_K)]
    unscaled_KS = (short_SK / values_K).T
    for columns, part_SC in doubled(delta):
        long_KL[:, columns] = unscaled_KS @ part_SC
    return Triplets(long_KL.T, values_K, short_SK) if is_tall else Triplets(short_SK, values_K, long_KL.T)


def gram(delta: Tensor | Unread) -> Tensor:
    """M M^T in fp64, of the shorter side."""
    total_SS = torch.zeros(min(delta.shape), min(delta.shape), dtype=torch.float64, device=delta.device)
    for _, part_SC in doubled(delta):
        add_gram(total_SS, part_SC)
    return mirrored(total_SS)


def joined(deltas: Iterable[Delta], ranks: Sequence[int], weights: Sequence[float]) -> Delta:
    """So many of the largest triplets of each, times its weight, made orthogonal together. Deltas are asked for one by one."""
    parts: list[Triplets] = []
    room_KL: Tensor | None = None
    used = 0
    coming = iter(deltas)
    for rank, weight in zip(ranks, weights, strict=True):
        delta = next(coming)
        if room_KL is None and not isinstance(delta, LowRank):
            room_KL = _room(delta, sum(ranks))
        part = top_triplets(delta, rank, None if room_KL is None else room_KL[used : used + rank])
        used += 0 if isinstance(delta, LowRank) else len(part.values_K)
        parts.append(part.scaled(weight))
        del delta, part  # before the next is made: the two of a large matrix would be the most that is held
    is_all = used == sum(len(part.values_K) for part in parts)
    return orthogonal_together(parts, long_KL=room_KL[:used] if room_KL is not None and is_all else None)


def orthogonal_together(parts: list[Triplets], values_K: Tensor | None = None, long_KL: Tensor | None = None) -> Delta:
    """U' diag(values) V'^T, where U' and V' are the nearest orthonormal columns to all left and right vectors side by side.

    With C = U^T U, U' = U C^-1/2 (the polar factor), so that all that is decomposed is K x K. Directions that are not there
    (C's eigenvalue is 0, as with two equal models) are left out of U'; the published codes fill them with whatever vectors
    their SVD returns. `values_K` takes the place of the parts' own; `long_KL`: the long vectors are there one below the other.
    Factors when those are smaller than the matrix or already there, else fp32. The parts are used up: the list is empty then.
    """
    shape = (parts[0].left_OK.shape[0], parts[0].right_IK.shape[0])
    is_tall = shape[0] > shape[1]
    lefts, rights = [part.left_OK for part in parts], [part.right_IK for part in parts]
    shorts, longs = (rights, lefts) if is_tall else (lefts, rights)
    values_K = torch.cat([part.values_K for part in parts]) if values_K is None else values_K
    parts.clear()
    root_KK = power_of(_gram_of_columns(shorts), -0.5)[0]
    short_SK = _rows(shorts) @ root_KK * values_K
    shorts.clear()  # before the next is made: what is held beside eigh is the most
    del root_KK
    is_whole = max(shape) < FREE * min(shape)
    root_KK, least = power_of(_gram_of_columns(longs, is_whole), -0.5)
    if least < FAR and not is_whole:  # what rounding has left of the parts' own products counts for as much as is small here
        root_KK, least = power_of(_gram_of_columns(longs, is_whole=True), -0.5)
    if least < FAR or long_KL is None:
        short_SK = short_SK @ root_KK
        return product(longs, [short_SK]) if is_tall else product([short_SK], longs)
    short_SK, long_KL = short_SK.float() @ root_KK.float(), long_KL.float()
    return LowRank(long_KL.T, short_SK.T) if is_tall else LowRank(short_SK, long_KL)


def product(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Delta:
    """left right^T in fp32, of columns side by side; as factors when those are smaller. Long sides are not put together in fp64."""
    rows, columns, rank = lefts[0].shape[0], rights[0].shape[0], sum(right.shape[1] for right in rights)
    if rank * (rows + columns) < rows * columns:
        return LowRank(_joined(lefts), _joined(rights).T)
    merged_OI = torch.empty(rows, columns, dtype=torch.float32, device=lefts[0].device)
    if rows <= columns:
        left_OK = _rows(lefts)
        for part in chunks(columns):
            merged_OI[:, part] = (left_OK @ _rows(rights, part).T).float()
    else:
        right_KI = _rows(rights).T
        for part in chunks(rows):
            merged_OI[part] = (_rows(lefts, part) @ right_KI).float()
    return merged_OI


def columns_of(delta: Delta, columns: slice) -> Tensor:
    """Some columns, good until the next are asked for."""
    if isinstance(delta, LowRank):
        return delta.left_OR @ delta.right_RI[:, columns]
    return delta[:, columns] if isinstance(delta, Tensor) else delta.read(slice(None), columns)


def num_bytes(shape: tuple[int, ...], num_models: int) -> int:
    """What a matrix takes at the peak, of dense deltas whose triplets are made orthogonal together, and what is merged.

    The long vectors of all, four squares of the short side in fp64 (three of them eigh's), beside some of which are a dense delta,
    the long vectors' fp32 copy or the merged matrix; the short side of some places.
    """
    short, long = sorted(shape)
    vectors, square, chunk = _long_dtype(shape).itemsize * short * long, 8 * short * short, 8 * short * min(CHUNK, long)
    return vectors + 4 * short * long + 4 * square + 6 * chunk


def largest_rank(delta: Delta) -> int:
    """How many singular values a matrix of this shape has."""
    return min(delta.shape)


def _short_side(gram_SS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their vectors, from a Gram matrix, which is used up."""
    noise = float(gram_SS.trace().abs()) * len(gram_SS) * torch.finfo(torch.float64).eps
    squares_S, vectors_SK = eigh(gram_SS, count)
    squares_K = squares_S.flip(0)[:count]
    kept = int((squares_K > noise).sum())
    return squares_K[:kept].sqrt(), vectors_SK.flip(1)[:, :kept].contiguous()


def _none_of(delta: Tensor | Unread) -> Triplets:
    empty = torch.empty(0, dtype=torch.float64, device=delta.device)
    return Triplets(empty.expand(delta.shape[0], 0), empty, empty.expand(delta.shape[1], 0))


def _of_factors(delta: LowRank, count: int) -> Triplets:
    left_OR, left_RR = torch.linalg.qr(delta.left_OR.double())
    right_IR, right_RR = torch.linalg.qr(delta.right_RI.double().T)
    u_RK, values_K, v_KR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    noise = float(values_K[:1].sum()) * max(delta.shape) * torch.finfo(torch.float64).eps
    kept = min(count, int((values_K > noise).sum()))
    return Triplets(left_OR @ u_RK[:, :kept], values_K[:kept], right_IR @ v_KR[:kept].T)


def power_of(gram_KK: Tensor, power: float) -> tuple[Tensor, float]:
    """C^power on the directions that are there, and the least eigenvalue (0 for no directions). C is used up."""
    values_K, vectors_KK = eigh(gram_KK)
    there_K = values_K > NULL * values_K[-1:]
    vectors_KK.mul_(torch.where(there_K, values_K.clamp_min(torch.finfo(torch.float64).tiny).pow(power / 2), 0.0))
    add_gram(gram_KK.zero_(), vectors_KK)
    return mirrored(gram_KK), float(values_K[:1].sum())


def _gram_of_columns(parts: Sequence[Tensor], is_whole: bool = False) -> Tensor:
    """U^T U in fp64, of columns side by side, on and below the diagonal, which is what eigh reads.

    Those of a part are orthonormal: their products are computed if `is_whole`.
    """
    stops = list(accumulate(part.shape[1] for part in parts))
    places = [slice(stop - part.shape[1], stop) for part, stop in zip(parts, stops, strict=True)]
    total_KK = torch.zeros(stops[-1], stops[-1], dtype=torch.float64, device=parts[0].device)
    if not is_whole:
        total_KK.fill_diagonal_(1.0)
    for rows in chunks(parts[0].shape[0]):
        chunk = [part[rows].double() for part in parts]
        for (one, one_RK), (other, other_RK) in combinations(zip(places, chunk, strict=True), 2):
            total_KK[other, one].addmm_(other_RK.T, one_RK)
        for place, part_RK in zip(places, chunk, strict=True) if is_whole else ():
            total_KK[place, place].addmm_(part_RK.T, part_RK)
    return total_KK


def add_gram(total_SS: Tensor, part_SC: Tensor) -> None:
    """Adds M M^T to what is on and below the diagonal: half of the work of all of it."""
    for start in range(0, len(part_SC), BLOCK):
        stop = start + BLOCK
        total_SS[start:stop, :stop].addmm_(part_SC[start:stop], part_SC[:stop].T)


def mirrored(total_SS: Tensor) -> Tensor:
    """With what is above the diagonal as below it."""
    for start in range(0, len(total_SS), BLOCK):
        total_SS[:start, start : start + BLOCK] = total_SS[start : start + BLOCK, :start].T
    return total_SS


def _room(delta: Tensor | Unread, count: int) -> Tensor:
    """Memory for so many long singular vectors."""
    return torch.empty(count, max(delta.shape), dtype=_long_dtype(delta.shape), device=delta.device)


def _long_dtype(shape: tuple[int, ...]) -> torch.dtype:
    short, long = sorted(shape)
    return torch.float64 if long <= short * (LONG if short * long < LARGE else LONG / 2) else torch.float32


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Columns side by side, fp32."""
    joined_RK = torch.empty(parts[0].shape[0], sum(part.shape[1] for part in parts), device=parts[0].device)
    return torch.cat(list(parts), dim=1, out=joined_RK)


def _rows(parts: Sequence[Tensor], rows: slice = slice(None)) -> Tensor:
    """Rows of columns side by side, fp64."""
    return torch.cat([part[rows].double() for part in parts], dim=1)


def doubled(delta: Tensor | Unread) -> Iterator[tuple[slice, Tensor]]:
    """Where and what: the short side in fp64, some places of the long one at a time, in memory that the next are put into."""
    short, long = sorted(delta.shape)
    buffer = torch.empty(short * min(CHUNK, long), dtype=torch.float64, device=delta.device)
    everything = slice(None)
    for place in chunks(long):
        rows, columns = (place, everything) if delta.shape[0] > delta.shape[1] else (everything, place)
        part = delta[rows, columns] if isinstance(delta, Tensor) else delta.read(rows, columns)
        part_SC = part.T if delta.shape[0] > delta.shape[1] else part
        yield place, buffer[: part_SC.numel()].view(part_SC.shape).copy_(part_SC)


def chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))
