"""Linear: the weighted mean of the models, and so of their deltas: sum w_i D_i / sum w_i.

Model soups (Wortsman et al., arXiv 2203.05482). As mergekit with normalize: true. The methods on matrices use it for
everything that is none.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import Options
from h3scale.merge.delta import Delta, Site, weighted_sum


def linear(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Options, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    return weighted_sum(deltas, shares(weights))


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1."""
    total = sum(weights)
    return [weight / total for weight in weights]
