"""Model Stock: the mean of the models, drawn towards the base as far as their deltas disagree.

Jang et al., arXiv 2403.19522: W = t mean(W_i) + (1 - t) W_0, t = M c / (1 + (M - 1) c), c the mean cosine of two deltas of this
tensor. As mergekit without filter_wise. Differences: dot products in fp64; a mean cosine of 0 or less gives t = 0, the base (the
paper knows acute angles only); a delta of zeros has cosine 0 with all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import ModelStock
from h3scale.merge.delta import Blocks, Delta, Site, Whole, weighted_sum


def survey(blocks: Blocks, options: ModelStock, weights: Sequence[float]) -> float:
    """The share t of the mean."""
    count = len(weights)
    dots_MM = torch.zeros(count, count, dtype=torch.float64)
    for _, deltas in blocks.pairs():
        deltas_MX = torch.stack([delta_X.reshape(-1).double() for delta_X in deltas])
        dots_MM += (deltas_MX @ deltas_MX.T).cpu()
    lengths_M = dots_MM.diagonal().sqrt()
    lengths_M = torch.where(lengths_M > 0, lengths_M, 1.0)
    cosines_MM = dots_MM / lengths_M / lengths_M[:, None]
    pairs = count * (count - 1)
    cosine = float(cosines_MM.sum() - cosines_MM.trace()) / pairs if pairs else 1.0
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0


def model_stock(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: ModelStock, site: Site) -> Delta:
    """The merged change of one tensor, before scaling."""
    share = survey(Whole(base_X, deltas), options, weights) if site.facts is None else site.facts
    total = sum(weights)
    return weighted_sum(deltas, [share * weight / total for weight in weights])
