"""The router's losses of a micro-batch and what is counted about its routing, on the device and without a wait.

Shape suffixes: T tokens, L layers, E experts, K experts a token takes, A alignments.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from h3scale.config.recipe import RouterLoss
from h3scale.model.router import alignment_log_probs, balance_loss_sum, first_choices, router_loss_sum, z_loss_sum


@dataclass(frozen=True)
class Routed:
    """The tokens that the router's logits are of, and what is asked of them.

    `labels_T`: alignment ids, -1 on padding. `votes_T`: which tokens count, bool. `member_AE`: which expert is of which alignment.
    `shares_LE`: how an earlier batch was shared out (train.balance), None where nothing is balanced.
    """

    labels_T: Tensor
    votes_T: Tensor
    member_AE: Tensor
    recipe: RouterLoss
    top_k: int
    shares_LE: Tensor | None = None


@dataclass(frozen=True)
class RouterTerms:
    """Sums over a micro-batch. `loss`: the router's losses times their weights, to be differentiated. `sums`: for the log.

    `first_choices_LE`: how many voting tokens have each expert as the best of their alignment's; None where nothing is balanced.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    first_choices_LE: Tensor | None


def router_terms(router_logits: Sequence[Tensor], routed: Routed) -> RouterTerms:
    """From the router's logits of every layer, (T, E) each: on a GPU by one kernel (train.router_kernel), else by torch."""
    logits_LTE = torch.stack(tuple(router_logits))
    if logits_LTE.is_cuda and has_triton():
        from h3scale.train.router_kernel import fused_terms

        return fused_terms(logits_LTE, routed)
    return plain_terms(logits_LTE, routed)


def plain_terms(logits_LTE: Tensor, routed: Routed) -> RouterTerms:
    """The same by torch's own operations."""
    logits_LTE = logits_LTE.float()
    loss, sums = logits_LTE.new_zeros(()), {}
    labels_T, votes_T, member_AE = routed.labels_T, routed.votes_T, routed.member_AE
    for name, weight, term in _losses(logits_LTE, routed):
        sums[name] = term.detach()
        if weight > 0:
            loss = loss + weight * term
    sums |= routing_sums(logits_LTE, labels_T, votes_T, member_AE, routed.top_k)
    chosen_LE = None if routed.shares_LE is None else first_choices(logits_LTE, labels_T, votes_T, member_AE)
    return RouterTerms(loss, sums, chosen_LE)


def _losses(logits_LTE: Tensor, routed: Routed) -> Iterator[tuple[str, float, Tensor]]:
    """Name, weight and sum over this micro-batch of each loss on the router's logits."""
    recipe, labels_T, votes_T, member_AE = routed.recipe, routed.labels_T, routed.votes_T, routed.member_AE
    yield "router", recipe.loss_weight, router_loss_sum(logits_LTE, labels_T, votes_T, member_AE)
    with torch.set_grad_enabled(recipe.z_weight > 0 and torch.is_grad_enabled()):
        z = z_loss_sum(logits_LTE, votes_T)
    yield "router_z", recipe.z_weight, z
    if routed.shares_LE is not None:
        balance = balance_loss_sum(logits_LTE, labels_T, votes_T, member_AE, routed.shares_LE)
        yield "router_balance", recipe.balance_weight, balance


@torch.no_grad()
def routing_sums(logits_LTE: Tensor, labels_T: Tensor, votes_T: Tensor, member_AE: Tensor, top_k: int) -> dict[str, Tensor]:
    """Sums over this micro-batch's tokens, to be added over micro-batches and ranks.

    votes_A: tokens that vote. routed_A: of these the right ones, whose log-probabilities summed over layers favour their
    own alignment. router_A: router loss of the votes, mean over layers. tokens_per_expert_LE: the prompt and response tokens
    that each expert takes; padding (label -1) is routed too, but no record's.
    """
    log_probs_LTA = alignment_log_probs(logits_LTE, member_AE)
    alignment_ids_A = torch.arange(len(member_AE), device=labels_T.device)
    mine_TA = (labels_T.unsqueeze(-1) == alignment_ids_A) & votes_T.unsqueeze(-1)
    right_T = log_probs_LTA.sum(0).argmax(-1) == labels_T
    chosen_LTK = logits_LTE.topk(top_k, dim=-1).indices
    real_LTK = (labels_T >= 0).to(torch.float64).unsqueeze(-1).expand_as(chosen_LTK)
    counts_LE = real_LTK.new_zeros(len(logits_LTE), member_AE.shape[-1])
    return {
        "votes_A": mine_TA.sum(0),
        "routed_A": (mine_TA & right_T.unsqueeze(-1)).sum(0),
        "router_A": -(log_probs_LTA.mean(0) * mine_TA).sum(0),
        "tokens_per_expert_LE": counts_LE.scatter_add_(1, chosen_LTK.flatten(1), real_LTK.flatten(1)),
    }


@cache
def has_triton() -> bool:
    """torch for GPUs brings it."""
    return importlib.util.find_spec("triton") is not None
