"""SLERP: two models on the arc between them, W = s_0 W_1 + s_1 W_2 with s_0 = sin((1-t) a) / sin a, s_1 = sin(t a) / sin a.

Shoemake 1985; as mergekit: a is the angle of the whole tensors laid flat, the weights are not normalised, and tensors that are
almost parallel (|cos| > 0.9995, which aligned models of one base are) are mixed in a straight line. Differences: dot products
in fp64, and `weights` are refused: t says it all.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import Slerp
from h3scale.merge.delta import Blocks, Delta, Site, Whole, dense

PARALLEL = 0.9995


def survey(blocks: Blocks, options: Slerp, weights: Sequence[float]) -> tuple[float, float]:
    """What the two models are multiplied by."""
    dots_MM = torch.zeros(2, 2, dtype=torch.float64)
    for base_X, deltas in blocks.pairs():
        models_MX = torch.stack([(base_X + delta_X).reshape(-1).double() for delta_X in deltas])
        dots_MM += (models_MX @ models_MX.T).cpu()
    lengths = math.sqrt(float(dots_MM[0, 0] * dots_MM[1, 1]))
    cosine = float(dots_MM[0, 1]) / lengths if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - options.t, options.t
    angle = math.acos(cosine)
    return math.sin((1 - options.t) * angle) / math.sin(angle), math.sin(options.t * angle) / math.sin(angle)


def slerp(base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Slerp, site: Site) -> Delta:
    """The merged change of one tensor."""
    first, second = site.facts or survey(Whole(base_X, deltas), options, weights)
    one_X, other_X = (dense(delta) for delta in deltas)
    return one_X * first + other_X * second + base_X * (first + second - 1)
