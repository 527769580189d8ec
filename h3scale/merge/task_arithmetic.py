"""Task arithmetic: the plain sum of the deltas, sum w_i D_i.

Ilharco et al., arXiv 2212.04089. Theirs multiplies the sum by a coefficient chosen on held-out data; that is `scaling`, and 1
when nobody chose.
"""

from collections.abc import Sequence

from torch import Tensor

from h3scale.config.merge import TaskArithmetic
from h3scale.merge.delta import Delta, Site, weighted_sum


def task_arithmetic(
    base_X: Tensor, deltas: Sequence[Delta], weights: Sequence[float], options: TaskArithmetic, site: Site
) -> Delta:
    """The merged change of one tensor, before scaling."""
    return weighted_sum(deltas, weights)
