"""WUDI: the change that differs least from each delta on what that delta's own rows span.

Cheng et al., arXiv 2503.08099: T minimises sum_i |(T - D_i) D_i^T|^2 / |D_i|^2. Where the authors take 300 steps of Adam from the
sum of the deltas, this is the minimum itself, of least norm: T = (sum D_i G_i / |D_i|^2) (sum G_i / |D_i|^2)^+, G_i = D_i^T D_i.
Matrices with fewer rows or ranks together than columns are worked on in the space of their rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.config.merge import Wudi
from h3scale.merge.delta import Delta, LowRank, Site, dense
from h3scale.merge.spectrum import NULL


def wudi(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: Wudi, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        rows_IK = torch.linalg.qr(torch.cat([delta.right_RI for delta in factors]).double().T)[0]
        inside = [delta.left_OR.double() @ (delta.right_RI.double() @ rows_IK) for delta in factors]
        return LowRank(_least_interference(inside, weights).float(), rows_IK.T.float())
    return _least_interference(deltas, weights).float()


def _least_interference(deltas: Sequence[Delta], weights: Sequence[float]) -> Tensor:
    top_OI = bottom_II = None
    for delta, weight in zip(deltas, weights, strict=True):
        delta_OI = dense(delta).double()
        gram_II = delta_OI.T @ delta_OI / delta_OI.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        if top_OI is None or bottom_II is None:
            top_OI, bottom_II = delta_OI @ gram_II * weight, gram_II
        else:
            top_OI.addmm_(delta_OI, gram_II, alpha=weight)
            bottom_II += gram_II
    assert top_OI is not None
    values_I, vectors_II = torch.linalg.eigh(bottom_II)
    there_I = values_I > NULL * values_I[-1:]
    inverse_I = torch.where(there_I, 1 / torch.where(there_I, values_I, 1.0), 0.0)
    return top_OI @ (vectors_II * inverse_I) @ vectors_II.T
