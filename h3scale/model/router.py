"""The router's mathematics, from its logits alone: no hooks in training, one forced route for measuring.

Shape suffixes: T tokens, L layers, E experts, A alignments. `router_logits` are raw (before any softmax).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.model.experts import ExpertMap


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
    minus_inf = torch.finfo(torch.float32).min
    by_alignment = logits.unsqueeze(-2).masked_fill(~member_AE, minus_inf).logsumexp(-1)  # (..., A)
    labelled = logits.masked_fill(~member_AE.any(0), minus_inf).logsumexp(-1, keepdim=True)
    return by_alignment - labelled


def router_loss_sum(router_logits: Sequence[Tensor], labels_T: Tensor, votes_T: Tensor, member_AE: Tensor) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of -log p(the token's alignment); a scalar.

    Args: router_logits: one (T, E) tensor a layer; labels_T: alignment ids (any value where votes_T is False);
    votes_T: which tokens count, bool. The caller divides by the votes of the whole global batch.
    Differs from the published code: log-probabilities, each layer supervised by itself, no padding, labels from records.
    """
    labels = labels_T.clamp_min(0).unsqueeze(-1)
    votes = votes_T.to(torch.float32)
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits_TE in router_logits:
        log_probs_TA = alignment_log_probs(logits_TE, member_AE)
        total = total - (log_probs_TA.gather(-1, labels).squeeze(-1) * votes).sum()
    return total / len(router_logits)


def z_loss_sum(router_logits: Sequence[Tensor], votes_T: Tensor) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of logsumexp(router logits)^2, a scalar (ST-MoE, equation 5).

    Keeps logits small, where low precision is finer. All experts enter, the general ones as well. Padding does not
    (it does in ST-MoE), and the caller divides by the votes of the whole global batch.
    """
    votes = votes_T.to(torch.float32)
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits_TE in router_logits:
        total = total + (logits_TE.float().logsumexp(-1).square() * votes).sum()
    return total / len(router_logits)


def balance_loss_sum(
    router_logits: Sequence[Tensor], labels_T: Tensor, votes_T: Tensor, member_AE: Tensor, shares_LE: Tensor
) -> Tensor:
    """Sum over the voting tokens, mean over the layers, of n * sum_e f_e p_e over the n experts of a token's own alignment.

    p is the softmax over these experts; f, `shares_LE`, is how an earlier batch was shared out among them. 1 where that was
    even; more for a token that prefers an expert that had more than its share.
    Differs from the Switch loss (arXiv 2101.03961, equation 4): each alignment by itself, and f is not of the same batch. A
    product of two means of one batch is not a sum over tokens: taken a micro-batch at a time, it would depend on how the batch
    is split. With f fixed beforehand every split gives the same loss and gradient.
    """
    votes = votes_T.to(torch.float32)
    sizes_T = member_AE.sum(-1)[labels_T.clamp_min(0)]
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits_TE, shares_E in zip(router_logits, shares_LE, strict=True):
        probs_TE = _own_logits(logits_TE, labels_T, member_AE).softmax(-1)
        total = total + (sizes_T * (probs_TE * shares_E).sum(-1) * votes).sum().float()
    return total / len(router_logits)


@torch.no_grad()
def first_choices(router_logits: Sequence[Tensor], labels_T: Tensor, votes_T: Tensor, member_AE: Tensor) -> Tensor:
    """How many voting tokens have each expert as the best of their own alignment's, (L, E) float64."""
    counts = []
    for logits_TE in router_logits:
        best_T = _own_logits(logits_TE, labels_T, member_AE).argmax(-1)
        counts.append(torch.bincount(best_T[votes_T], minlength=logits_TE.shape[-1]))
    return torch.stack(counts).double()


def _own_logits(logits_TE: Tensor, labels_T: Tensor, member_AE: Tensor) -> Tensor:
    """The logits in fp32, those of experts of other alignments than the token's as low as can be."""
    own_TE = member_AE[labels_T.clamp_min(0)]
    return logits_TE.float().masked_fill(~own_TE, torch.finfo(torch.float32).min)


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
