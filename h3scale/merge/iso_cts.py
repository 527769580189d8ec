"""Iso-CTS: Iso-C with room for directions that one model alone has.

Marczak et al., arXiv 2502.04959: the first c triplets of D = sum w_i D_i (c: `common_fraction` of the rank, so that the rest
divides evenly), the first (r - c) / M triplets of each (I - U_c U_c^T) D_i, all made orthogonal together with the mean of all their
singular values in the place of each. As the authors' code; directions that are not there are left out, as in Iso-C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import IsoCts
from h3scale.merge.delta import Delta, LowRank, Site, dense, length, weighted_sum
from h3scale.merge.spectrum import Triplets, largest_rank, orthogonal_together, top_triplets

ROUNDING = 1e-8  # what is left of a delta that lies in the common directions, as a share of its length


def iso_cts(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: IsoCts, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    total = weighted_sum(deltas, weights)
    rank = largest_rank(base_OI)
    of_each = round((rank - int(rank * options.common_fraction)) / len(deltas))
    common = top_triplets(total, rank - of_each * len(deltas))
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


def without(delta: Delta, common: Triplets) -> Delta:
    """(I - U_c U_c^T) D, fp64."""
    left_OK = common.left_OK.double()
    if isinstance(delta, LowRank):
        factor_OR = delta.left_OR.double()
        return LowRank(factor_OR - left_OK @ (left_OK.T @ factor_OR), delta.right_RI)
    delta_OI = dense(delta).double()
    return delta_OI - left_OK @ (left_OK.T @ delta_OI)
