"""The losses of one micro-batch, each a sum divided by a count of the whole global batch.

The loader knows these counts, so there is no collective here, and 1 rank x 8 micro-batches gives what 4 ranks x 2 give.
Shape suffixes: B rows, S tokens a row, T = B x S, L layers, E experts, A alignments, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from h3scale.config.recipe import RouterLoss
from h3scale.data.collate import IGNORE, PADDING, PROMPT, RESPONSE, Batch
from h3scale.model.router import balance_loss_sum, router_loss_sum, z_loss_sum
from h3scale.train.balance import Balance
from h3scale.train.routing import routing_sums
from h3scale.train.token_nll import token_nll

ROLES_OF_VOTE = {"prompt": (PROMPT,), "response": (RESPONSE,), "both": (PROMPT, RESPONSE)}


@dataclass(frozen=True)
class Counts:
    """What the sums of one global batch are divided by: weighted target tokens, and tokens that vote on the route."""

    targets: float
    votes: int


@dataclass
class Losses:
    """`total` is to be differentiated; `sums` are plain numbers of this rank for the log, to be added over ranks.

    `total` is scaled so that the mean over the ranks and micro-batches, which DeepSpeed takes, is the loss of the
    global batch.
    """

    total: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def compute_losses(
    engine: Any,
    batch: Batch,
    counts: Counts,
    recipe: RouterLoss,
    alignments: list[str],
    member_AE: Tensor | None,
    parts: int,
    balance: Balance | None = None,
) -> Losses:
    """LM and router losses of one micro-batch. `parts`: ranks x micro-batches of a step, which DeepSpeed averages over."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if member_AE is not None:
        inputs["output_router_logits"] = True
    output = engine(**inputs)
    lm, sums = _lm(output.logits, batch, alignments)
    total = lm / counts.targets
    if member_AE is not None:
        labels_T, votes_T = batch.alignment_ids.flatten(), votes(batch, recipe.vote)
        for name, weight, term in _router_terms(output.router_logits, labels_T, votes_T, member_AE, recipe, balance):
            sums[name] = term.detach()
            if weight > 0:
                total = total + weight * term / counts.votes
        if balance:
            balance.add(output.router_logits, labels_T, votes_T)
        sums.update(routing_sums(output.router_logits, labels_T, votes_T, member_AE, engine.module.config.num_experts_per_tok))
    return Losses(total * parts, sums)


def _lm(logits: Tensor, batch: Batch, alignments: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the targets' negative log-likelihoods, and for the log the same by alignment."""
    weights_T = batch.target_weights.flatten()
    weighted_T = token_nll(logits.flatten(0, 1), batch.targets.flatten(), IGNORE) * weights_T
    lm = weighted_T.sum()
    sums = {"lm": lm.detach()}
    place_T = batch.alignment_ids.flatten() % (len(alignments) + 1)  # padding, -1, comes last
    for name, values_T in (("lm", weighted_T.detach()), ("targets", weights_T)):
        by_place = values_T.new_zeros(len(alignments) + 1).index_add(0, place_T, values_T)
        sums |= {f"{name}/{alignment}": by_place[a] for a, alignment in enumerate(alignments)}
    return lm, sums


def _router_terms(
    router_logits: tuple[Tensor, ...],
    labels_T: Tensor,
    votes_T: Tensor,
    member_AE: Tensor,
    recipe: RouterLoss,
    balance: Balance | None,
) -> Iterator[tuple[str, float, Tensor]]:
    """Name, weight and sum over this micro-batch of each loss on the router's logits."""
    yield "router", recipe.loss_weight, router_loss_sum(router_logits, labels_T, votes_T, member_AE)
    with torch.set_grad_enabled(recipe.z_weight > 0 and torch.is_grad_enabled()):
        z = z_loss_sum(router_logits, votes_T)
    yield "router_z", recipe.z_weight, z
    if balance:
        shares_LE = balance.shares_LE
        yield "router_balance", recipe.balance_weight, balance_loss_sum(router_logits, labels_T, votes_T, member_AE, shares_LE)


def votes(batch: Batch, vote: str) -> Tensor:
    """Which tokens vote on the route, (T,) bool; padding never does."""
    roles_T = batch.roles.flatten()
    chosen_T = torch.zeros_like(roles_T, dtype=torch.bool)
    for role in ROLES_OF_VOTE[vote]:
        chosen_T |= roles_T == role
    return chosen_T & (roles_T != PADDING)
