"""DARE with TIES: entries are dropped at random and rescaled (dare), then signs are elected and those that agree are averaged.

Yu et al., arXiv 2311.03099, and Yadav et al., arXiv 2306.01708. The random drop takes the place of trimming, as in mergekit; the
authors' code trims after it as well. The mean is TIES's; mergekit sums here unless normalize is set.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import DareTies
from h3scale.merge.dare import dropped
from h3scale.merge.delta import Delta, Site
from h3scale.merge.election import agreeing_mean


def dare_ties(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: DareTies, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    return agreeing_mean(dropped(deltas, options, site), weights)
