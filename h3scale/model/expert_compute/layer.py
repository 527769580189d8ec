"""A layer's experts around a backend: tokens are sorted by expert, computed, weighted and summed where they came from.

Shape suffixes: T tokens, K choices a token, R = T x K rows sorted by expert, E experts, H hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from h3scale.model.expert_compute.registry import Backend

CACHED = 256


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
    place_TK = place_R.view_as(chosen_TK)
    counts_E = torch.zeros(len(w2_EHI), dtype=torch.int64, device=expert_R.device)
    counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R))
    rows_RH = _Sort.apply(hidden_TH, order_R, place_TK)
    rows_RH = backend(rows_RH, counts_E, w1, w2_EHI, w3)
    return _Sum.apply(rows_RH, weights_TK, order_R, place_TK)


class _Sort(torch.autograd.Function):
    """Each token once for each of its experts, in their order. Indexing's own backward adds up row by row, or with atomics."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return hidden_TH.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> Any:
        (place_TK,) = ctx.saved_tensors
        grad_TH = grad_RH.new_empty(len(place_TK), grad_RH.shape[1])
        exact = torch.promote_types(grad_RH.dtype, torch.float32)
        for piece in _pieces(place_TK):
            grad_TH[piece] = _rows(grad_RH, place_TK[piece]).to(exact).sum(1)
        return grad_TH, None, None


class _Sum(torch.autograd.Function):
    """The rows back in the order of the tokens, weighted and summed."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weights_TK: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RH, weights_TK, order_R, place_TK)
        output_TH = rows_RH.new_empty(len(place_TK), rows_RH.shape[1])
        for piece in _pieces(place_TK):
            output_TH[piece] = (_rows(rows_RH, place_TK[piece]) * weights_TK[piece].unsqueeze(-1)).sum(1)
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> Any:
        """Row by row as they are sorted, so that nothing is scattered."""
        rows_RH, weights_TK, order_R, place_TK = ctx.saved_tensors
        token_R, weight_R1 = order_R // place_TK.shape[1], weights_TK.flatten()[order_R].unsqueeze(-1)
        grad_rows_RH, grad_weight_R = torch.empty_like(rows_RH), weights_TK.new_empty(len(order_R))
        for piece in _pieces(order_R):
            grad_PH = grad_TH.index_select(0, token_R[piece]).to(weights_TK.dtype)
            grad_weight_R[piece] = (rows_RH[piece] * grad_PH).sum(-1)
            grad_rows_RH[piece] = grad_PH.mul_(weight_R1[piece])
        return grad_rows_RH, grad_weight_R[place_TK], None, None


def _rows(rows_RH: Tensor, place_TK: Tensor) -> Tensor:
    """(T, K, H): those of each token. On a CPU seven times as fast as indexing by two dimensions."""
    return rows_RH.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1)


def _pieces(places: Tensor) -> list[slice]:
    """All tokens (or rows) at once on a GPU; on a CPU so many that what is made of them on the way stays in its cache."""
    step = len(places) if places.is_cuda else CACHED
    return [slice(first, first + step) for first in range(0, len(places), step)]
