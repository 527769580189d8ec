"""DELLA: entries are dropped at random, the large ones less often, then signs are elected and those that agree are averaged.

Deep et al., arXiv 2406.11617 (MAGPRUNE). In each row of a matrix (a vector is one row) the magnitudes are ranked 0 .. n-1; rank r
stays with p = density - window + 2 window r / (n - 1) and is divided by p. As the authors' code, in which the window is twice ours
(theirs .14: .07 here). Equal magnitudes are ranked by their place; ours is the mean of those that agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import Della
from h3scale.merge.chance import chances
from h3scale.merge.delta import Delta, Site, dense
from h3scale.merge.election import agreeing_mean


def della(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Della, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    left = []
    for model, delta in enumerate(deltas):
        values_X = dense(delta)
        drawn_X = chances(values_X.numel(), options.seed, site.name, site.model(model), site.start)
        stays_X = chance_to_stay(values_X, options)
        kept_X = drawn_X.view(values_X.shape).to(values_X.device) < stays_X
        left.append((values_X * kept_X / stays_X).to(values_X.dtype))
    return agreeing_mean(left, weights)


def chance_to_stay(values_X: Tensor, options: Della) -> Tensor:
    """By rank of magnitude in the row, fp64."""
    width = values_X.shape[-1] if values_X.dim() else 1
    if width == 1:
        return torch.full(values_X.shape, options.density, dtype=torch.float64, device=values_X.device)
    order_X = values_X.abs().argsort(dim=-1, stable=True)
    steps_I = torch.arange(width, dtype=torch.float64, device=values_X.device) / (width - 1)
    by_rank_I = options.density - options.window + 2 * options.window * steps_I
    return torch.empty_like(values_X, dtype=torch.float64).scatter_(-1, order_X, by_rank_I.expand(values_X.shape))
