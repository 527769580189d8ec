"""DARE: entries are dropped at random and the others made larger by as much, then the deltas are summed.

Yu et al., arXiv 2311.03099: m ~ Bernoulli(density), D' = m D / density, sum w_i D'_i. As the authors' code; mergekit rescales to
the old L1 norm instead of by 1 / density. What is dropped depends on (seed, tensor, model) alone.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import Dare, DareTies
from h3scale.merge.chance import chances
from h3scale.merge.delta import Delta, Site, dense, weighted_sum


def dropped(deltas: Sequence[Delta], options: Dare | DareTies, site: Site) -> list[Tensor]:
    """Each delta with what is left of it, rescaled."""
    left = []
    for model, delta in enumerate(deltas):
        values_X = dense(delta)
        drawn_X = chances(values_X.numel(), options.seed, site.name, site.model(model), site.start)
        kept_X = (drawn_X < options.density).to(values_X).view(values_X.shape)
        left.append(kept_X.mul_(values_X).div_(options.density))
    return left


def dare(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Dare, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    return weighted_sum(dropped(deltas, options, site), weights)
