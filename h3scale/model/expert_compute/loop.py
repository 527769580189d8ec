"""A product an expert, one after the other: the reference on every device, and as fast as any on a CPU.

Shape suffixes: R rows, E experts, K and N any two widths.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor


class Loop:
    """Kernels of model.expert_compute.swiglu. Any dtype. On a GPU it waits for the counts."""

    def groups(self, counts_E: Tensor) -> list[slice]:
        ends = list(accumulate(counts_E.tolist(), initial=0))
        return [slice(first, last) for first, last in pairwise(ends)]

    def product(self, rows_RK: Tensor, weight_EKN: Tensor, groups: list[slice]) -> Tensor:
        out_RN = rows_RK.new_empty(len(rows_RK), weight_EKN.shape[2])
        for expert, mine in enumerate(groups):
            torch.mm(rows_RK[mine], weight_EKN[expert], out=out_RN[mine])
        out_RN[groups[-1].stop :].zero_()
        return out_RN

    def outer(self, left_RN: Tensor, right_RK: Tensor, groups: list[slice]) -> Tensor:
        out_ENK = left_RN.new_empty(len(groups), left_RN.shape[1], right_RK.shape[1])
        for expert, mine in enumerate(groups):
            torch.mm(left_RN[mine].T, right_RK[mine], out=out_ENK[expert])
        return out_ENK
