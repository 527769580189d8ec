"""WUDI: the change that differs least from each delta on what that delta's own rows span.

Cheng et al., arXiv 2503.08099: T minimises sum_i |(T - D_i) D_i^T|^2 / |D_i|^2. Where the authors take 300 steps of Adam from the
sum of the deltas, this is the minimum itself, of least norm: T = (sum D_i G_i / |D_i|^2) (sum G_i / |D_i|^2)^+, G_i = D_i^T D_i.

With E the rows of all deltas one below the other, each delta divided by its length, that is B (E E^T)^+ E as well, B the blocks
|D_i| E_i E_i^T side by side: matrices with fewer rows together than columns (factors: fewer ranks) need no square of their columns.
What is decomposed is fp64 of the smaller of the two, which for wide matrices of a large model takes minutes and GB each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import Wudi
from h3scale.merge import spectrum
from h3scale.merge.delta import Delta, LowRank, Site, rows_of
from h3scale.merge.spectrum import add_gram, chunks, columns_of, mirrored, power_of


def wudi(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Wudi, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        rows_IK = torch.linalg.qr(torch.cat([delta.right_RI for delta in factors]).double().T)[0]
        inside = [delta.left_OR.double() @ (delta.right_RI.double() @ rows_IK) for delta in factors]
        return LowRank(_by_columns(inside, weights), rows_IK.T.float())
    rows, columns = base_OI.shape
    return _by_rows(deltas, weights) if len(deltas) * rows < columns else _by_columns(deltas, weights)


def num_bytes(shape: tuple[int, ...], num_models: int) -> int:
    """What a matrix takes at the peak, of dense deltas: what is merged, and fp64 squares of the smaller side, some rows of it."""
    rows, columns = shape
    stacked = num_models * rows
    side = min(stacked, columns)
    held = 4 * rows * columns + 24 * side * side + 16 * side * spectrum.CHUNK
    return held + (16 * rows * stacked if stacked < columns else 8 * num_models * side * side)


def _by_columns(deltas: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """(sum w_i D_i G_i / |D_i|^2) (sum G_i / |D_i|^2)^+; fp32."""
    height, width = deltas[0].shape
    grams, total_II = [], torch.zeros(width, width, dtype=torch.float64, device=deltas[0].device)
    for delta in deltas:
        gram_II = torch.zeros_like(total_II)
        for rows in chunks(height):
            add_gram(gram_II, rows_of(delta, rows.start, rows.stop).double().T)
        grams.append(mirrored(gram_II).div_(_square(gram_II)))
        total_II += gram_II
    inverse_II = power_of(total_II, -1)[0]
    merged_OI = torch.empty(height, width, device=total_II.device)
    for rows in chunks(height):
        top_OI = torch.zeros(rows.stop - rows.start, width, dtype=torch.float64, device=total_II.device)
        for delta, gram_II, weight in zip(deltas, grams, weights, strict=True):
            top_OI.addmm_(rows_of(delta, rows.start, rows.stop).double(), gram_II, alpha=weight)
        merged_OI[rows] = (top_OI @ inverse_II).float()
    return merged_OI


def _by_rows(deltas: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    """B (E E^T)^+ E; fp32. R: rows of all deltas."""
    height, width = deltas[0].shape
    stacked = height * len(deltas)
    gram_RR = torch.zeros(stacked, stacked, dtype=torch.float64, device=deltas[0].device)
    for columns in chunks(width):
        add_gram(gram_RR, _stacked(deltas, columns))
    mirrored(gram_RR)
    places = [slice(start, start + height) for start in range(0, stacked, height)]
    lengths = [math.sqrt(_square(gram_RR[place, place])) for place in places]
    for place, size in zip(places, lengths, strict=True):
        gram_RR[place] /= size
        gram_RR[:, place] /= size
    left_OR = torch.cat([gram_RR[p, p] * (weight * size) for p, weight, size in zip(places, weights, lengths, strict=True)], dim=1)
    left_OR = left_OR @ power_of(gram_RR, -1)[0]
    for place, size in zip(places, lengths, strict=True):
        left_OR[:, place] /= size
    merged_OI = torch.empty(height, width, device=left_OR.device)
    for columns in chunks(width):
        merged_OI[:, columns] = (left_OR @ _stacked(deltas, columns)).float()
    return merged_OI


def _stacked(deltas: Sequence[Delta], columns: slice) -> Tensor:
    """Columns of all deltas one below the other, fp64."""
    return torch.cat([columns_of(delta, columns).double() for delta in deltas])


def _square(gram: Tensor) -> float:
    """|D|^2; of a delta of zeros what can be divided by."""
    return max(float(gram.trace()), torch.finfo(torch.float64).tiny)
