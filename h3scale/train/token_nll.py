"""Negative log-likelihood of each token, without an fp32 copy of all logits.

At a vocabulary of 128,000 one such copy of 16,000 tokens is 8 GB, and plain cross entropy has three of them in backward. Here
logits are taken to fp32 a chunk of tokens at a time, again in backward; beside them there is their gradient, in their dtype.
Shape suffixes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**26  # 256 MB in fp32


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, ignore: int) -> Tensor:
        nll_T = logits_TV.new_zeros(len(targets_T), dtype=torch.float32)
        normaliser_T = torch.empty_like(nll_T)
        for span in _chunks(logits_TV):
            logits = logits_TV[span].float()
            normaliser_T[span] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets_T[span, None].clamp_min(0)).squeeze(-1)
            nll_T[span] = torch.where(targets_T[span] == ignore, 0, normaliser_T[span] - chosen)
        ctx.save_for_backward(logits_TV, targets_T, normaliser_T)
        ctx.ignore = ignore
        return nll_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits_TV, targets_T, normaliser_T = ctx.saved_tensors
        weight_T = torch.where(targets_T == ctx.ignore, 0, gradients[0])
        found_TV = torch.empty_like(logits_TV)
        for span in _chunks(logits_TV):
            probs = logits_TV[span].float().sub_(normaliser_T[span, None]).exp_()
            probs.scatter_add_(-1, targets_T[span, None].clamp_min(0), probs.new_full((len(probs), 1), -1))
            found_TV[span] = probs.mul_(weight_T[span, None])
        return found_TV, None, None


def token_nll(logits_TV: Tensor, targets_T: Tensor, ignore: int) -> Tensor:
    """-log p(target) in fp32, (T,); 0 where the target is `ignore`. The gradient is the logits' own dtype."""
    found: Tensor = _TokenNll.apply(logits_TV, targets_T, ignore)
    return found


def _chunks(logits_TV: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // logits_TV.shape[-1])
    for start in range(0, len(logits_TV), rows):
        yield slice(start, start + rows)
