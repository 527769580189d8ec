"""Iso-C: the sum of the deltas with all singular values equal to their mean: D = sum w_i D_i = U S V^T, change mean(S) U V^T.

Marczak et al., arXiv 2502.04959. As the authors' code for matrices of full rank. Directions that D does not have (LoRA deltas have
a few only) are left out of both the product and the mean: the authors' U V^T fills them with vectors of the SVD's choice.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import IsoC
from h3scale.merge.delta import Delta, Site, weighted_sum
from h3scale.merge.spectrum import largest_rank, product, top_triplets


def iso_c(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: IsoC, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    total = weighted_sum(deltas, weights)
    found = top_triplets(total, largest_rank(total))
    del total  # of a large matrix as much memory as what comes next
    mean = found.values_K.sum() / max(len(found.values_K), 1)
    if base_OI.shape[0] > base_OI.shape[1]:
        return product([found.left_OK], [found.right_IK * mean])
    return product([found.left_OK * mean], [found.right_IK])
