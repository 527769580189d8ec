"""The router's losses, their gradient and what is counted about routing by one Triton kernel that reads the logits once.

Torch's own operations (train.router_terms.plain_terms, which says what everything means) are more than a hundred small kernels
a micro-batch. Here they are a few: the layers' logits put together, this kernel, the sum of what its programs found, and backward's
product. Everything is fp32, and sums are taken in an order that does not depend on timing, so they are the same each time.

Shape suffixes: T tokens, L layers, E experts, A alignments; in the kernel one program's tokens, and E and A up to powers of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3scale.train.router_terms import Routed, RouterTerms

TOKENS = 32  # of one program: 8,192 tokens are twice as many programs as an H100 has multiprocessors
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# What a program finds, in this order; then the tokens of each layer and expert, and the first choices.
SCALARS = ("loss", "router", "router_z", "router_balance")
BY_ALIGNMENT = ("votes_A", "routed_A", "router_A")


def fused_terms(logits_LTE: Tensor, routed: Routed) -> RouterTerms:
    """What `plain_terms` gives, but for rounding; sums are float64."""
    loss, found = _Fused.apply(logits_LTE, routed)
    (num_layers, _, num_experts), num_alignments = logits_LTE.shape, len(routed.member_AE)
    table = num_layers * num_experts
    scalars, by_alignment, tokens, chosen = found.split([len(SCALARS), len(BY_ALIGNMENT) * num_alignments, table, table])
    sums = dict(zip(SCALARS[1:], scalars[1:], strict=True)) | dict(
        zip(BY_ALIGNMENT, by_alignment.view(len(BY_ALIGNMENT), -1), strict=True)
    )
    is_balanced = routed.shares_LE is not None
    if not is_balanced:
        del sums["router_balance"]
    sums["tokens_per_expert_LE"] = tokens.view(num_layers, num_experts)
    return RouterTerms(loss, sums, chosen.view(num_layers, num_experts) if is_balanced else None)


class _Fused(torch.autograd.Function):
    """The gradient is made with the loss, while the logits are at hand; backward scales it."""

    @staticmethod
    def forward(ctx: Any, logits_LTE: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
        member_AE, shares_LE, recipe = routed.member_AE, routed.shares_LE, routed.recipe
        num_layers, num_tokens, num_experts = logits_LTE.shape
        num_programs = triton.cdiv(num_tokens, TOKENS)
        table = num_layers * num_experts
        num_found = len(SCALARS) + len(BY_ALIGNMENT) * len(member_AE) + 2 * table
        found_PN = torch.empty(num_programs, num_found, dtype=torch.float32, device=logits_LTE.device)
        has_gradient = ctx.needs_input_grad[0]
        gradient_LTE = torch.empty_like(logits_LTE, dtype=torch.float32) if has_gradient else found_PN
        _kernel[(num_programs,)](
            logits_LTE,
            routed.labels_T,
            routed.votes_T.view(torch.uint8),
            member_AE.view(torch.uint8),
            found_PN if shares_LE is None else shares_LE,
            gradient_LTE,
            found_PN,
            num_tokens,
            num_layers,
            num_found,
            recipe.loss_weight,
            recipe.z_weight,
            recipe.balance_weight,
            NUM_EXPERTS=num_experts,
            NUM_ALIGNMENTS=len(member_AE),
            TOP_K=routed.top_k,
            HAS_GRADIENT=has_gradient,
            HAS_SHARES=shares_LE is not None,
            BLOCK_T=TOKENS,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_A=triton.next_power_of_2(len(member_AE)),
        )
        found = found_PN.sum(0, dtype=torch.float64)
        ctx.dtype = logits_LTE.dtype
        ctx.save_for_backward(gradient_LTE)
        ctx.mark_non_differentiable(found)
        ctx.set_materialize_grads(False)
        return found[0].float(), found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        if outer[0] is None:
            return None, None
        (gradient_LTE,) = ctx.saved_tensors
        scaled_LTE = torch.empty_like(gradient_LTE, dtype=ctx.dtype)
        torch.mul(gradient_LTE, outer[0], out=scaled_LTE)
        return scaled_LTE, None


@triton.jit
def _lse(x, is_in):
    """Logarithm of the sum of exponentials of some of each row, (rows,)."""
    kept = tl.where(is_in, x, LOWEST)
    greatest = tl.max(kept, 1)
    return greatest + tl.log(tl.sum(tl.where(is_in, tl.exp(kept - greatest[:, None]), 0.0), 1))


@triton.jit
def _kernel(
    logits,
    labels,
    votes,
    member,
    shares,
    gradient,
    found,
    num_tokens,
    num_layers,
    num_found,
    router_weight,
    z_weight,
    balance_weight,
    NUM_EXPERTS: tl.constexpr,
    NUM_ALIGNMENTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_SHARES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    a = tl.arange(0, BLOCK_A)
    is_token_T = t < num_tokens
    is_expert_TE = (e < NUM_EXPERTS)[None, :] & (t >= 0)[:, None]
    label_T = tl.load(labels + t, is_token_T, other=-1).to(tl.int32)
    is_vote_T = tl.load(votes + t, is_token_T, other=0) != 0
    is_real_T = label_T >= 0
    own_TE = tl.load(member + tl.maximum(label_T, 0)[:, None] * NUM_EXPERTS + e[None, :], is_expert_TE, other=0) != 0
    size_T = tl.sum(own_TE.to(tl.float32), 1)
    is_labelled_TE = own_TE
    for alignment in tl.static_range(NUM_ALIGNMENTS):
        is_labelled_TE = is_labelled_TE | (tl.load(member + alignment * NUM_EXPERTS + e, e < NUM_EXPERTS, other=0) != 0)[None, :]

    row = found + tl.program_id(0).to(tl.int64) * num_found
    tokens_at = row + 4 + 3 * NUM_ALIGNMENTS
    chosen_at = tokens_at + num_layers * NUM_EXPERTS
    router_T = tl.zeros([BLOCK_T], tl.float32)
    z_T = tl.zeros([BLOCK_T], tl.float32)
    balance_T = tl.zeros([BLOCK_T], tl.float32)
    log_probs_TA = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    for layer in range(num_layers):
        place_TE = (layer * num_tokens + t[:, None]) * NUM_EXPERTS + e[None, :]
        x_TE = tl.load(logits + place_TE, is_token_T[:, None] & is_expert_TE, other=0.0).to(tl.float32)
        all_T = _lse(x_TE, is_expert_TE)
        labelled_T = _lse(x_TE, is_labelled_TE)
        mine_T = _lse(x_TE, own_TE)
        for alignment in tl.static_range(NUM_ALIGNMENTS):
            member_E = tl.load(member + alignment * NUM_EXPERTS + e, e < NUM_EXPERTS, other=0) != 0
            log_prob_T = _lse(x_TE, member_E[None, :] & is_expert_TE) - labelled_T
            log_probs_TA += tl.where((a == alignment)[None, :], log_prob_T[:, None], 0.0)
        router_T += labelled_T - mine_T
        z_T += all_T * all_T
        probs_TE = tl.where(own_TE, tl.exp(x_TE - mine_T[:, None]), 0.0)  # among the experts of the token's own alignment
        slope_TE = router_weight * (tl.where(is_labelled_TE, tl.exp(x_TE - labelled_T[:, None]), 0.0) - probs_TE)
        if z_weight > 0:
            slope_TE += 2 * z_weight * all_T[:, None] * tl.where(is_expert_TE, tl.exp(x_TE - all_T[:, None]), 0.0)
        if HAS_SHARES:
            share_E = tl.load(shares + layer * NUM_EXPERTS + e, e < NUM_EXPERTS, other=0.0).to(tl.float32)
            kept_T = tl.sum(probs_TE * share_E[None, :], 1)
            balance_T += size_T * kept_T
            slope_TE += balance_weight * size_T[:, None] * probs_TE * (share_E[None, :] - kept_T[:, None])
            best_T = tl.argmax(tl.where(own_TE, x_TE, float("-inf")), 1)
            is_best_TE = (e[None, :] == best_T[:, None]) & is_vote_T[:, None]
            tl.store(chosen_at + layer * NUM_EXPERTS + e, tl.sum(is_best_TE.to(tl.float32), 0), e < NUM_EXPERTS)
        if HAS_GRADIENT:
            slope_TE = tl.where(is_vote_T[:, None], slope_TE, 0.0) / num_layers
            tl.store(gradient + place_TE, slope_TE, is_token_T[:, None] & is_expert_TE)
        taken_E = tl.zeros([BLOCK_E], tl.float32)
        left_TE = tl.where(is_expert_TE, x_TE, float("-inf"))
        for _ in tl.static_range(TOP_K):
            is_taken_TE = e[None, :] == tl.argmax(left_TE, 1)[:, None]
            left_TE = tl.where(is_taken_TE, float("-inf"), left_TE)
            taken_E += tl.sum((is_taken_TE & is_real_T[:, None]).to(tl.float32), 0)
        tl.store(tokens_at + layer * NUM_EXPERTS + e, taken_E, e < NUM_EXPERTS)

    router = tl.sum(tl.where(is_vote_T, router_T, 0.0)) / num_layers
    z = tl.sum(tl.where(is_vote_T, z_T, 0.0)) / num_layers
    balance = tl.sum(tl.where(is_vote_T, balance_T, 0.0)) / num_layers
    tl.store(row, router_weight * router + z_weight * z + balance_weight * balance)
    tl.store(row + 1, router)
    tl.store(row + 2, z)
    tl.store(row + 3, balance)
    mine_TA = (a[None, :] == label_T[:, None]) & is_vote_T[:, None]
    is_right_T = tl.argmax(tl.where((a < NUM_ALIGNMENTS)[None, :], log_probs_TA, float("-inf")), 1) == label_T
    by_alignment = row + 4 + a
    tl.store(by_alignment, tl.sum(mine_TA.to(tl.float32), 0), a < NUM_ALIGNMENTS)
    tl.store(by_alignment + NUM_ALIGNMENTS, tl.sum((mine_TA & is_right_T[:, None]).to(tl.float32), 0), a < NUM_ALIGNMENTS)
    losses_A = -tl.sum(tl.where(mine_TA, log_probs_TA, 0.0), 0) / num_layers
    tl.store(by_alignment + 2 * NUM_ALIGNMENTS, losses_A, a < NUM_ALIGNMENTS)
