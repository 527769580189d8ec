"""Consensus TA: the sum of the deltas where at least `consensus` models need it.

Wang et al., arXiv 2405.07813 (TALL masks): model i needs an entry where |D_i| > mask_threshold |S - D_i|, S = sum w_j D_j; the
change is S where enough models do, else 0. As the authors' code, which chooses a threshold for each model on held-out data; here it
is one for all. Weights multiply the deltas before all of this.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import ConsensusTa
from h3scale.merge.delta import Delta, Site, dense, weighted_sum


def consensus_ta(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: ConsensusTa, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    values = [dense(delta) * weight for delta, weight in zip(deltas, weights, strict=True)]
    sum_X = dense(weighted_sum(values, [1.0] * len(values)))
    needed_X = torch.zeros_like(sum_X)
    for delta_X in values:
        needed_X += delta_X.abs() > options.mask_threshold * (sum_X - delta_X).abs()
    return sum_X * (needed_X >= options.consensus)
