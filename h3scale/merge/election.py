"""The second half of TIES, which others share: a sign for every entry, and the mean of the models that agree with it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def agreeing_mean(deltas_MX: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, entry by entry, of the deltas whose sign is that of the weighted sum; 0 where nothing is left.

    An entry whose sum is exactly 0 gets 0: neither direction has more mass. (The TIES authors take the majority sign of the
    whole vector there, mergekit takes +.)
    """
    weighted = [delta if weight == 1 else delta * weight for delta, weight in zip(deltas_MX, weights, strict=True)]
    sign_X = weighted[0].clone()
    for delta_X in weighted[1:]:
        sign_X += delta_X
    sign_X.sign_()
    total_X, share_X = torch.zeros_like(sign_X), torch.zeros_like(sign_X)
    for delta_X, weight in zip(weighted, weights, strict=True):
        along_X = (delta_X * sign_X).clamp_min_(0)
        total_X += along_X
        share_X.add_(along_X.sign_(), alpha=weight)
    return total_X.mul_(sign_X).div_(share_X.clamp_min_(torch.finfo(share_X.dtype).tiny))  # 0 where nothing is left
