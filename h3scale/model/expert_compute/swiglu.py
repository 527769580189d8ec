"""The SwiGLU of experts as one function with a backward of its own, over any kernels for products of sorted rows.

Shape suffixes: R rows, sorted by expert; E experts, H hidden, I intermediate, U = 2I (gate above up); K, N any two widths.
Rows after the last expert's belong to nobody: what comes out in their place means nothing, and nothing else depends on it.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Gemms(Protocol):
    """Products of rows, each with the matrix of its expert. `groups` is whatever the kernels want to know about the counts."""

    def groups(self, counts_E: Tensor) -> Any: ...

    def product(self, rows_RK: Tensor, weight_EKN: Tensor, groups: Any) -> Tensor:
        """(R, N): each row times its expert's matrix, which may be a transposed view."""
        ...

    def outer(self, left_RN: Tensor, right_RK: Tensor, groups: Any) -> Tensor:
        """(E, N, K): left^T @ right over the rows of each expert; zeros for one without rows."""
        ...


def swiglu(gemms: Gemms, rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    """down(silu(gate(x)) * up(x)) of every row's own expert, (R, H).

    w1 and w3: (E, I, H) each; or w1 alone with gate above up, (E, 2I, H), as transformers stacks them.
    """
    weights = [weight.to(rows_RH.dtype) for weight in (w2_EHI, w1, w3) if weight is not None]
    return _SwiGlu.apply(gemms, rows_RH, counts_E, *weights)


class _SwiGlu(torch.autograd.Function):
    """Saves the weights themselves, never a view of them.

    Under ZeRO-3 a view that autograd keeps holds the gathered weights of a layer from its forward to its backward, those of all
    layers together; the weight itself is empty in between. Plain autograd also makes a gradient of the size of all experts for
    each `weight[e]`. Of the activations gate and up are kept; their product, as large as either, is computed again.
    """

    @staticmethod
    def forward(ctx: Any, gemms: Gemms, rows_RH: Tensor, counts_E: Tensor, w2_EHI: Tensor, *ups: Tensor) -> Tensor:
        groups = gemms.groups(counts_E)
        parts = [gemms.product(rows_RH, up.mT, groups) for up in ups]
        gate_RI, up_RI = parts if len(parts) > 1 else parts[0].chunk(2, -1)
        ctx.gemms, ctx.groups = gemms, groups
        ctx.save_for_backward(rows_RH, gate_RI, up_RI, w2_EHI, *ups)
        return gemms.product(F.silu(gate_RI) * up_RI, w2_EHI.mT, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> Any:
        rows_RH, gate_RI, up_RI, w2_EHI, *ups = ctx.saved_tensors
        gemms, groups = ctx.gemms, ctx.groups
        _, needs_rows, _, needs_w2, *needs_ups = ctx.needs_input_grad
        grad_RH = grad_RH.contiguous()
        activated_RI = F.silu(gate_RI)
        grad_w2 = gemms.outer(grad_RH, activated_RI * up_RI, groups) if needs_w2 else None
        if not needs_rows and not any(needs_ups):
            return None, None, None, grad_w2, *[None] * len(ups)
        hidden_RI = gemms.product(grad_RH, w2_EHI, groups)  # the gradient of the product
        grads = _gate_and_up(hidden_RI, activated_RI, gate_RI, up_RI, packed=len(ups) == 1)
        grad_ups = [gemms.outer(grad, rows_RH, groups) if need else None for grad, need in zip(grads, needs_ups, strict=True)]
        grad_rows = None
        if needs_rows:
            grad_rows, *more = (gemms.product(grad, up, groups) for grad, up in zip(grads, ups, strict=True))
            for part in more:
                grad_rows += part
        return None, grad_rows, None, grad_w2, *grad_ups


def _gate_and_up(hidden_RI: Tensor, activated_RI: Tensor, gate_RI: Tensor, up_RI: Tensor, packed: bool) -> list[Tensor]:
    """The gradients of gate and up: two of (R, I), or side by side, one of (R, 2I)."""
    both_RU = hidden_RI.new_empty(len(hidden_RI), 2 * hidden_RI.shape[1]) if packed else None
    first, second = both_RU.chunk(2, -1) if both_RU is not None else (torch.empty_like(hidden_RI), torch.empty_like(hidden_RI))
    torch.mul(hidden_RI, activated_RI, out=second)
    torch.ops.aten.silu_backward.grad_input(hidden_RI * up_RI, gate_RI, grad_input=first)
    return [both_RU] if both_RU is not None else [first, second]
