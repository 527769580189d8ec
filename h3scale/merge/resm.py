"""RESM (reconstruction): TSV-M with outlier weights and ranks that follow sparsity.

Yang et al., arXiv 2502.06876 ("reweighting enhanced task singular merging"). The abstract names the two ideas; formulae and code
are not public, so this is a reconstruction, and every choice is an option:

- outliers: entries of |D_i| above mean + outlier_kappa standard deviations, in each matrix of each model.
  `outliers: model`: with w_i their share of |D_i|'s sum, D_i counts M w_i / sum w_j times (a heavy tail is signal).
  `outliers: element`: they are cut to the threshold (a heavy tail is noise); a factored delta gets entries by that.
- rank: c_i entries are at least sparsity_threshold times the largest, and not 0; D_i gets floor(r c_i / n) triplets of r, or its
  part floor(r c_i / sum c_j) where those are more than r together; at least one.
- then TSV-M's orthogonalisation. With `outliers: none` and `rank: constant` it is TSV-M bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from h3scale.config.merge import Resm
from h3scale.merge.delta import Delta, LowRank, Site, dense, length, magnitudes
from h3scale.merge.spectrum import joined, largest_rank


@dataclass(frozen=True)
class Traits:
    """Of one delta: where outliers begin, their share of all magnitude, and how many entries matter for the rank."""

    threshold: float
    outlier_share: float
    num_dense: int


def resm(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Resm, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    traits = [traits_of(delta, options) for delta in deltas]
    ranks = ranks_of(traits, largest_rank(base_OI), math.prod(base_OI.shape), options)
    shares = [trait.outlier_share for trait in traits]
    if options.outliers == "model" and sum(shares) > 0:
        weights = [weight * len(deltas) * share / sum(shares) for weight, share in zip(weights, shares, strict=True)]
    if options.outliers != "element":
        return joined(deltas, ranks, weights)
    return joined((_cut(deltas[i], trait.threshold) for i, trait in enumerate(traits)), ranks, weights)


def _cut(delta: Delta, limit: float) -> Tensor:
    """All entries, none of them further from 0 than the limit."""
    return delta.clamp(-limit, limit) if isinstance(delta, Tensor) else dense(delta).clamp_(-limit, limit)


def traits_of(delta: Delta, options: Resm) -> Traits:
    """Two passes over the entries, in blocks that are summed in fp32, and their sums in fp64."""
    total, most, count = 0.0, 0.0, math.prod(delta.shape)
    squares = length(delta) ** 2 if isinstance(delta, LowRank) else 0.0
    for sizes_X in magnitudes(delta):
        total += float(sizes_X.sum())
        most = max(most, float(sizes_X.amax()))
        if not isinstance(delta, LowRank):  # by pairs; a dot product rounds more, and entries at the threshold change sides
            squares += float(sizes_X.square_().sum())
    mean = total / count
    threshold = mean + options.outlier_kappa * math.sqrt(max(squares / count - mean * mean, 0.0))
    below = max(0.0, float(np.nextafter(np.float32(options.sparsity_threshold * most), np.float32(-1))))
    outside, num_dense = 0.0, 0
    for sizes_X in magnitudes(delta):
        num_dense += _count_above(sizes_X, below)
        outside += float(torch.threshold_(sizes_X, threshold, 0.0).sum())
    return Traits(threshold, outside / total if total else 0.0, num_dense)


def _count_above(values_X: Tensor, limit: float) -> int:
    """How many values are larger: numpy compares and counts in half of torch's time, but not on a GPU."""
    if values_X.device.type == "cpu":
        return int(np.count_nonzero(values_X.numpy() > limit))
    return int(torch.count_nonzero(values_X > limit))


def ranks_of(traits: Sequence[Traits], rank: int, numel: int, options: Resm) -> list[int]:
    """How many triplets each delta gets, in whole numbers throughout."""
    counts = [trait.num_dense for trait in traits]
    if options.rank == "constant" or not sum(counts):
        return [max(1, rank // len(traits))] * len(traits)
    ranks = [rank * count // numel for count in counts]
    if sum(ranks) > rank:
        ranks = [rank * count // sum(counts) for count in counts]
    return [max(1, each) for each in ranks]
