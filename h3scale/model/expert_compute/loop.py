"""An expert after the other: the reference on every device, and as fast as any on a CPU.

Shape suffixes: R rows sorted by expert, M rows of one expert, E experts, H hidden, I intermediate, U = 2I (gate above up);
K, N any two widths.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def loop(rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    """A backend (model.expert_compute.registry) for any dtype. On a GPU it waits for the counts.

    All of an expert is computed before the next: what lies between its products is still in a CPU's cache. Bit for bit what
    DeepSpeed's loop gives.
    """
    weights = [weight.to(rows_RH.dtype) for weight in (w2_EHI, w1, w3) if weight is not None]
    return _Loop.apply(rows_RH, counts_E, *weights)


class _Loop(torch.autograd.Function):
    """As model.expert_compute.swiglu says: weights themselves are saved, each gradient is made once, gate and up are kept.

    On a CPU silu(gate) is kept too: to compute it again takes 2.5% of the time of forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, counts_E: Tensor, w2_EHI: Tensor, *ups: Tensor) -> Tensor:
        ctx.groups = row_groups(counts_E)
        output_RH = rows_RH.new_empty(len(rows_RH), w2_EHI.shape[1])
        kept = []
        for expert, mine in enumerate(ctx.groups):
            parts = [rows_RH[mine] @ up[expert].T for up in ups]
            gate_MI, up_MI = _halves(parts)
            activated_MI = F.silu(gate_MI)
            torch.mm(activated_MI * up_MI, w2_EHI[expert].T, out=output_RH[mine])
            kept += [*parts, activated_MI] if rows_RH.device.type == "cpu" else parts
        output_RH[ctx.groups[-1].stop :].zero_()
        ctx.save_for_backward(rows_RH, w2_EHI, *ups, *kept)
        return output_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> Any:
        needs_rows, _, needs_w2, *needs_ups = ctx.needs_input_grad
        rows_RH, w2_EHI, *rest = ctx.saved_tensors
        ups, kept = rest[: len(needs_ups)], rest[len(needs_ups) :]
        grad_rows = torch.empty_like(rows_RH) if needs_rows else None
        grad_w2 = w2_EHI.new_empty(w2_EHI.shape) if needs_w2 else None
        grad_ups = [up.new_empty(up.shape) if need else None for up, need in zip(ups, needs_ups, strict=True)]
        for expert, mine in enumerate(ctx.groups):
            mine_kept = kept[expert * len(kept) // len(ctx.groups) :]
            parts = mine_kept[: len(ups)]
            activated_MI = mine_kept[len(ups)] if grad_RH.device.type == "cpu" else F.silu(_halves(parts)[0])
            into = None if grad_w2 is None else grad_w2[expert]
            grads = _back_to_products(grad_RH[mine], parts, activated_MI, w2_EHI[expert], into)
            for grad, grad_up in zip(grads, grad_ups, strict=True):
                if grad_up is not None:
                    torch.mm(grad.T, rows_RH[mine], out=grad_up[expert])
            if grad_rows is not None:
                torch.mm(grads[0], ups[0][expert], out=grad_rows[mine])
                for grad, up in zip(grads[1:], ups[1:], strict=True):
                    grad_rows[mine].add_(grad @ up[expert])
        if grad_rows is not None:
            grad_rows[ctx.groups[-1].stop :].zero_()
        return grad_rows, None, grad_w2, *grad_ups


def _back_to_products(
    grad_MH: Tensor, parts: Sequence[Tensor], activated_MI: Tensor, w2_HI: Tensor, grad_w2_HI: Tensor | None
) -> list[Tensor]:
    """The gradients of `parts`, laid out alike; that of w2 goes to `grad_w2_HI`."""
    gate_MI, up_MI = _halves(parts)
    grads = [torch.empty_like(part) for part in parts]
    grad_gate_MI, grad_up_MI = _halves(grads)
    if grad_w2_HI is not None:
        torch.mm(grad_MH.T, activated_MI * up_MI, out=grad_w2_HI)
    hidden_MI = grad_MH @ w2_HI  # the gradient of their product
    torch.mul(hidden_MI, activated_MI, out=grad_up_MI)
    torch.ops.aten.silu_backward.grad_input(hidden_MI.mul_(up_MI), gate_MI, grad_input=grad_gate_MI)
    return grads


def _halves(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up: two tensors, or the halves of one."""
    first, second = parts if len(parts) > 1 else parts[0].chunk(2, -1)
    return first, second


def row_groups(counts_E: Tensor) -> list[slice]:
    """Where each expert's rows are."""
    return [slice(first, last) for first, last in pairwise(accumulate(counts_E.tolist(), initial=0))]


class LoopGemms:
    """Kernels of model.expert_compute.swiglu, a product an expert."""

    def groups(self, counts_E: Tensor) -> list[slice]:
        return row_groups(counts_E)

    def product(self, rows_RK: Tensor, weight_EKN: Tensor, groups: list[slice]) -> Tensor:
        out_RN = rows_RK.new_empty(len(rows_RK), weight_EKN.shape[2])
        for expert, mine in enumerate(groups):
            torch.mm(rows_RK[mine], weight_EKN[expert], out=out_RN[mine])
        return out_RN

    def outer(self, left_RN: Tensor, right_RK: Tensor, groups: list[slice]) -> Tensor:
        out_ENK = left_RN.new_empty(len(groups), left_RN.shape[1], right_RK.shape[1])
        for expert, mine in enumerate(groups):
            torch.mm(left_RN[mine].T, right_RK[mine], out=out_ENK[expert])
        return out_ENK
