"""Model Breadcrumbs: neither the outliers nor what is negligible; the sum of what lies between, sum w_i m_i D_i.

Davari and Belilovsky, arXiv 2312.06795: of each tensor's magnitudes the share `outliers` of the largest and 1 - density - outliers
of the smallest are left out. As mergekit's breadcrumbs, fewer outliers being left out where the two do not fit; but mergekit
empties a tensor whose outliers are less than one entry, here it then loses none. All that equal the ends of what is kept are kept.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn.functional import hardshrink

from h3scale.config.merge import Breadcrumbs
from h3scale.merge.delta import Blocks, Delta, Site, Whole, dense, weighted_sum
from h3scale.merge.select import largest
from h3scale.merge.ties import trimmed

Range = tuple[float, float]


def survey(blocks: Blocks, options: Breadcrumbs, weights: Sequence[float]) -> list[Range]:
    """The least and the largest magnitude that are kept, of each model."""
    kept = max(1, int(options.density * blocks.numel))
    above = min(int(options.outliers * blocks.numel), blocks.numel - kept)
    ranges = []
    for model in range(len(weights)):
        of_model = partial(blocks.delta, model)
        least = largest(of_model, blocks.numel, above + kept)
        ranges.append((least, largest(of_model, blocks.numel, above + 1) if above else float("inf")))
    return ranges


def breadcrumbs(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Breadcrumbs, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    ranges: list[Range] = site.facts or survey(Whole(base_X, deltas), options, weights)
    kept = []
    for delta, (least, most) in zip(deltas, ranges, strict=True):
        values_X = dense(delta)
        kept.append(trimmed(values_X, least) - hardshrink(values_X, most))
    return weighted_sum(kept, weights)
