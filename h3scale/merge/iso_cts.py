"""Iso-CTS: Iso-C with room for directions that one model alone has.

Marczak et al., arXiv 2502.04959: the first c triplets of D = sum w_i D_i (c: `common_fraction` of the rank, so that the rest
divides evenly), the first (r - c) / M triplets of each (I - U_c U_c^T) D_i, all made orthogonal together with the mean of all their
singular values in the place of each. As the authors' code; directions that are not there are left out, as in Iso-C.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import IsoCts
from h3scale.merge import spectrum
from h3scale.merge.delta import Delta, LowRank, Site, length, weighted_sum
from h3scale.merge.spectrum import Triplets, doubled, largest_rank, orthogonal_together, top_triplets

ROUNDING = 1e-8  # what is left of a delta that lies in the common directions, as a share of its length


def iso_cts(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: IsoCts, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    total = weighted_sum(deltas, weights)
    rank = largest_rank(base_OI)
    of_each = min(round((rank - int(rank * options.common_fraction)) / len(deltas)), rank // len(deltas))
    common = top_triplets(total, rank - of_each * len(deltas))
    del total  # of a large matrix as much memory as a delta
    parts = [common]
    parts += [
        top_triplets(without(delta, common), of_each).above(ROUNDING * length(delta)).scaled(weight)
        for delta, weight in zip(deltas, weights, strict=True)
    ]
    count = sum(len(part.values_K) for part in parts)
    if not count:
        return orthogonal_together(parts)
    mean = torch.cat([part.values_K for part in parts]).mean()
    return orthogonal_together(parts, mean.expand(count))


def num_bytes(shape: tuple[int, ...], num_models: int) -> int:
    """What a matrix takes at the peak: what the others on spectra do, and what is left of a delta in fp64 instead of fp32."""
    return spectrum.num_bytes(shape, num_models) + 4 * math.prod(shape)


def without(delta: Delta, common: Triplets) -> Delta:
    """(I - U_c U_c^T) D, fp64."""
    left_OK = common.left_OK
    if isinstance(delta, LowRank):
        left_OK, factor_OR = left_OK.double(), delta.left_OR.double()
        return LowRank(factor_OR - left_OK @ (left_OK.T @ factor_OR), delta.right_RI)
    rest_OI = torch.empty(delta.shape, dtype=torch.float64, device=delta.device)
    if delta.shape[0] > delta.shape[1]:
        inside_KI = torch.zeros(left_OK.shape[1], delta.shape[1], dtype=torch.float64, device=delta.device)
        for rows, part_IC in doubled(delta):
            inside_KI.addmm_(left_OK[rows].double().T, part_IC.T)
        for rows, part_IC in doubled(delta):
            rest_OI[rows] = part_IC.T.addmm(left_OK[rows].double(), inside_KI, alpha=-1)
    else:
        left_OK = left_OK.double()
        for columns, part_OC in doubled(delta):
            rest_OI[:, columns] = part_OC.addmm(left_OK, left_OK.T @ part_OC, alpha=-1)
    return rest_OI
