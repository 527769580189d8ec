"""A layer's experts around a backend: tokens are sorted by expert, computed, weighted and summed where they came from.

Shape suffixes: T tokens, K choices a token, R = T x K rows sorted by expert, E experts, H hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from h3scale.model.expert_compute.registry import Backend


def mix(
    backend: Backend, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None
) -> Tensor:
    """The weighted sum of what each token's chosen experts make of it, (T, H) in the dtype of the tokens.

    Sums are in the dtype of the weights, which routers give in fp32, and in the order of the choices: on every device the same
    bits each time. The gradients of hidden_TH and of weights_TK flow; `w1`, `w2_EHI`, `w3` as backends take them.
    """
    expert_R, order_R = chosen_TK.flatten().sort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    counts_E = torch.zeros(len(w2_EHI), dtype=torch.int64, device=expert_R.device)
    counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R))
    rows_RH = _Sort.apply(hidden_TH, order_R, place_R, chosen_TK.shape[1])
    rows_RH = backend(rows_RH, counts_E, w1, w2_EHI, w3)
    return _Sum.apply(rows_RH, weights_TK, order_R, place_R).to(hidden_TH.dtype)


class _Sort(torch.autograd.Function):
    """Each token once for each of its experts, in their order. Indexing's own backward adds up row by row, or with atomics."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_R: Tensor, place_R: Tensor, choices: int) -> Tensor:
        ctx.choices = choices
        ctx.save_for_backward(place_R)
        return hidden_TH[order_R // choices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> Any:
        (place_R,) = ctx.saved_tensors
        return grad_RH[place_R].unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class _Sum(torch.autograd.Function):
    """The rows back in the order of the tokens, weighted and summed."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weights_TK: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RH, weights_TK, order_R, place_R)
        weighted_RH = rows_RH * weights_TK.flatten()[order_R].unsqueeze(-1)
        return weighted_RH[place_R].unflatten(0, weights_TK.shape).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        rows_RH, weights_TK, order_R, place_R = ctx.saved_tensors
        grad_RH = grad_TH[order_R // weights_TK.shape[1]]
        grad_weights_R = (grad_RH * rows_RH).sum(-1)
        grad_rows_RH = (grad_RH * weights_TK.flatten()[order_R].unsqueeze(-1)).to(rows_RH.dtype)
        return grad_rows_RH, grad_weights_R[place_R].view_as(weights_TK).to(weights_TK.dtype), None, None
