"""The router's mathematics, from its logits alone: no hooks in training, one forced route for measuring.

Shape suffixes: T tokens, L layers, E experts, A alignments. Router logits are raw (before any softmax), of any dtype, and
taken as fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.model.experts import ExpertMap

LOWEST = torch.finfo(torch.float32).min  # in the place of minus infinity, which would make NaN of a difference


def membership_AE(expert_map: ExpertMap, device: torch.device | str = "cpu") -> Tensor:
    """True where expert E belongs to alignment A, (A, E) bool; a general expert's column is all False."""
    rows = [[expert == alignment for expert in expert_map.experts] for alignment in expert_map.alignments]
    return torch.tensor(rows, device=device)


def alignment_log_probs(router_logits_TE: Tensor, member_AE: Tensor) -> Tensor:
    """Log-probability of each alignment, (..., A) fp32: softmax over the labelled experts only, summed by alignment.

    General experts are neither rewarded nor pushed away: their logits do not enter. Perfect routing gives 0 for the
    right alignment; equal logits give -ln(A) when every alignment has equally many experts. The published H3Fusion
    code applies a cross entropy to probabilities instead, which costs 0.551 at best.
    """
    logits = router_logits_TE.float()
    by_alignment = logits.unsqueeze(-2).masked_fill(~member_AE, LOWEST).logsumexp(-1)  # (..., A)
    labelled = logits.masked_fill(~member_AE.any(0), LOWEST).logsumexp(-1, keepdim=True)
    return by_alignment - labelled


def router_loss_sum(logits_LTE: Tensor, labels_T: Tensor, votes_T: Tensor, member_AE: Tensor) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of -log p(the token's alignment); a scalar.

    Args: labels_T: alignment ids (any value where votes_T is False); votes_T: which tokens count, bool. The caller divides by
    the votes of the whole global batch.
    Differs from the published code: log-probabilities, each layer supervised by itself, no padding, labels from records.
    """
    logits_LTE = logits_LTE.float()
    labelled_LT = logits_LTE.masked_fill(~member_AE.any(0), LOWEST).logsumexp(-1)
    own_LT = _own_logits(logits_LTE, labels_T, member_AE).logsumexp(-1)
    return ((labelled_LT - own_LT) * votes_T).sum() / len(logits_LTE)


def z_loss_sum(logits_LTE: Tensor, votes_T: Tensor) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of logsumexp(router logits)^2, a scalar (ST-MoE, equation 5).

    Keeps logits small, where low precision is finer. All experts enter, the general ones as well. Padding does not
    (it does in ST-MoE), and the caller divides by the votes of the whole global batch.
    """
    return (logits_LTE.float().logsumexp(-1).square() * votes_T).sum() / len(logits_LTE)


def balance_loss_sum(logits_LTE: Tensor, labels_T: Tensor, votes_T: Tensor, member_AE: Tensor, shares_LE: Tensor) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of n * sum_e f_e p_e over the n experts of a token's own alignment.

    p is the softmax over these experts; f, `shares_LE`, is how an earlier batch was shared out among them. 1 where that was
    even; more for a token that prefers an expert that had more than its share.
    Differs from the Switch loss (arXiv 2101.03961, equation 4): each alignment by itself, and f is not of the same batch. A
    product of two means of one batch is not a sum over tokens: taken a micro-batch at a time, it would depend on how the batch
    is split. With f fixed beforehand every split gives the same loss and gradient.
    """
    sizes_T = member_AE.sum(-1)[labels_T.clamp_min(0)]
    probs_LTE = _own_logits(logits_LTE.float(), labels_T, member_AE).softmax(-1)
    kept_LT = (probs_LTE * shares_LE.float().unsqueeze(1)).sum(-1)
    return (sizes_T * kept_LT * votes_T).sum() / len(logits_LTE)


@torch.no_grad()
def first_choices(logits_LTE: Tensor, labels_T: Tensor, votes_T: Tensor, member_AE: Tensor) -> Tensor:
    """How many voting tokens have each expert as the best of their own alignment's, (L, E) float64."""
    best_LT = _own_logits(logits_LTE.float(), labels_T, member_AE).argmax(-1)
    counts_LE = torch.zeros(len(logits_LTE), logits_LTE.shape[-1], dtype=torch.float64, device=best_LT.device)
    return counts_LE.scatter_add_(1, best_LT, votes_T.double().expand_as(best_LT))


def _own_logits(logits_LTE: Tensor, labels_T: Tensor, member_AE: Tensor) -> Tensor:
    """The logits, those of experts of other alignments than the token's as low as can be."""
    return logits_LTE.masked_fill(~member_AE[labels_T.clamp_min(0)], LOWEST)


def router_modules(model: nn.Module) -> list[nn.Module]:
    """The transformers router modules (they return logits, weights, expert ids) of an MoE model, in layer order."""
    layers: Any = model.get_submodule("model.layers")
    return [layer.mlp.gate for layer in layers if hasattr(getattr(layer, "mlp", None), "gate")]


@contextmanager
def forced_routing(model: nn.Module, weights: Callable[[int], Tensor] | Tensor) -> Iterator[None]:
    """Replaces what the routers decide: `weights` (E,) or (T, E), rows summing to 1; a callable gets T.

    The logits that the routers report stay their own. For
    transformers models (evaluation, router start, tests), not for AutoEP.
    """

    def replace(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits_TE, scores, _ = output
        num_tokens, num_experts = logits_TE.shape
        forced = weights(num_tokens) if callable(weights) and not isinstance(weights, Tensor) else weights
        forced_TE = forced.to(scores).expand(num_tokens, num_experts)
        used = forced_TE.ne(0).any(0).nonzero().squeeze(-1)  # an expert that nobody takes need not run
        return logits_TE, forced_TE[:, used], used.expand(num_tokens, -1)

    handles = [router.register_forward_hook(replace) for router in router_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expert_weights(expert_map: ExpertMap, alignment: str) -> Tensor:
    """Oracle routing for one alignment, (E,): its experts share the weight, all others get 0."""
    weights_E = torch.zeros(expert_map.num_experts)
    chosen = expert_map.experts_of(alignment)
    weights_E[chosen] = 1.0 / len(chosen)
    return weights_E
