"""The package `grouped_gemm` as far as MegaBlocks calls it (`ops.gmm`), on torch's own products.

Shape suffixes: R rows sorted by expert, E experts, K and N any two widths.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from h3scale.model.expert_compute.grouped import Grouped, is_real
from h3scale.model.expert_compute.loop import LoopGemms


class _Gmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weight: Tensor, counts_E: Tensor, trans_b: bool) -> Tensor:
        ctx.gemms = Grouped() if is_real(weight) else LoopGemms()
        ctx.groups, ctx.trans_b = ctx.gemms.groups(counts_E.to(rows_RK.device)), trans_b
        ctx.save_for_backward(rows_RK, weight)
        return ctx.gemms.product(rows_RK, weight.mT if trans_b else weight, ctx.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> Any:
        rows_RK, weight = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        grad_rows = ctx.gemms.product(grad_RN, weight if ctx.trans_b else weight.mT, ctx.groups)
        left, right = (grad_RN, rows_RK) if ctx.trans_b else (rows_RK, grad_RN)
        return grad_rows, ctx.gemms.outer(left, right, ctx.groups), None, None


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """(R, N): rows of `a` times their expert's matrix of `b`, (E, K, N) or with `trans_b` (E, N, K)."""
    return _Gmm.apply(a, b, batch_sizes, trans_b)


ops = SimpleNamespace(gmm=gmm)
backend = None  # its other door, which only memory_optimized_mlp takes
