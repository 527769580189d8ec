"""The losses of one micro-batch, each a sum divided by a count of the whole global batch.

The loader knows these counts, so there is no collective here, and 1 rank x 8 micro-batches gives what 4 ranks x 2 give.
Shape suffixes: B rows, S tokens a row, T = B x S, L layers, E experts, A alignments, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from h3scale.config.recipe import RouterLoss
from h3scale.data.collate import IGNORE, PADDING, PROMPT, RESPONSE, Batch
from h3scale.model.router_logits import with_router_logits
from h3scale.train.balance import Balance
from h3scale.train.router_terms import Routed, router_terms
from h3scale.train.token_nll import token_nll

ROLE_OF_VOTE = {"prompt": PROMPT, "response": RESPONSE}


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
    output = engine(**inputs) if member_AE is None else with_router_logits(engine, engine.module, **inputs)
    lm, sums = _lm(output.logits, batch, alignments)
    total = lm / counts.targets
    if member_AE is not None:
        labels_T, votes_T = batch.alignment_ids.flatten(), votes_of(batch.roles.flatten(), recipe.vote)
        top_k = engine.module.config.num_experts_per_tok
        shares_LE = balance.shares_LE if balance else None
        terms = router_terms(output.router_logits, Routed(labels_T, votes_T, member_AE, recipe, top_k, shares_LE))
        total = torch.add(total, terms.loss, alpha=1 / counts.votes)
        sums |= terms.sums
        if balance and terms.first_choices_LE is not None:
            balance.add(terms.first_choices_LE)
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


def votes_of(roles_T: Tensor, vote: str) -> Tensor:
    """Which tokens vote on the route, (T,) bool; padding never does."""
    return roles_T != PADDING if vote == "both" else roles_T == ROLE_OF_VOTE[vote]
