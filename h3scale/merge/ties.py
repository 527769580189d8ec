"""TIES: trim, elect sign, disjoint mean.

Yadav et al., arXiv 2306.01708. (1) Of each delta the share `density` of the largest magnitudes is kept; (2) the sign of an entry
is that of the (weighted) sum of what is kept; (3) the mean of the models that have this sign.

`scope: model` looks for the largest in the whole model, as the authors' code; `scope: tensor` in each tensor, as mergekit.
Weights multiply before the election and divide again in the mean, as in mergekit; the authors have none. Differences: floor(density
n) entries are kept (at least one; the authors' code keeps one more), and all that equal the least of them; an entry whose sum is
exactly 0 stays 0 (see election).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor
from torch.nn.functional import hardshrink

from h3scale.config.merge import Ties
from h3scale.merge.delta import Blocks, Delta, Site, Whole, dense
from h3scale.merge.election import agreeing_mean
from h3scale.merge.select import largest


def survey(blocks: Blocks, options: Ties, weights: Sequence[float]) -> tuple[float, ...]:
    """The least magnitude that is kept, of each model."""
    count = max(1, int(options.density * blocks.numel))
    return tuple(largest(partial(blocks.delta, model), blocks.numel, count) for model in range(len(weights)))


def ties(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Ties, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    thresholds = site.facts or survey(Whole(base_X, deltas), options, weights)
    kept = [trimmed(dense(delta), least) for delta, least in zip(deltas, thresholds, strict=True)]
    return agreeing_mean(kept, weights)


def trimmed(values_X: Tensor, least: float) -> Tensor:
    """What is at least so large, and 0 elsewhere; in one pass, where comparing and multiplying takes ten times as long."""
    below = float(np.nextafter(np.float32(least), np.float32(-1)))
    return hardshrink(values_X, below)
