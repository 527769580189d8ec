"""TSV-M: every model gets an equal share of the rank, and the singular vectors of all are made orthogonal together.

Gargiulo et al., arXiv 2412.00081: D_i = U_i S_i V_i^T, the first floor(r / M) triplets of each side by side, U and V replaced by
their polar factors U', V'; the change is U' S V'^T. As the authors' code, but for directions that U or V does not have (models that
are alike): those are left out, where the authors' SVD puts vectors of its own choice. fp64 Gram matrices instead of full SVDs.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import TsvM
from h3scale.merge.delta import Delta, Site
from h3scale.merge.spectrum import joined, largest_rank


def tsv_m(base_OI: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: TsvM, site: Site) -> Delta:
    """The merged change of one matrix, before scaling."""
    rank = max(1, largest_rank(base_OI) // len(deltas))
    return joined(deltas, [rank] * len(deltas), weights)
