"""The losses of one micro-batch, each a sum divided by a count of the whole global batch.

The loader knows these counts, so there is no collective here, and 1 rank x 8 micro-batches gives what 4 ranks x 2 give.
Shape suffixes: B rows, S tokens a row, T = B x S, L layers, E experts, A alignments, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from h3scale.config.recipe import RouterLoss
from h3scale.data.collate import IGNORE, PADDING, PROMPT, RESPONSE, Batch
from h3scale.model.router import router_loss_sum
from h3scale.train.routing import routing_sums

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
    engine: Any, batch: Batch, counts: Counts, recipe: RouterLoss, alignments: list[str], member_AE: Tensor | None, parts: int
) -> Losses:
    """LM and router loss of one micro-batch. `parts`: ranks x micro-batches of a step, which DeepSpeed averages over."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if member_AE is not None:
        inputs["output_router_logits"] = True
    output = engine(**inputs)
    logits_TV = output.logits.flatten(0, 1).float()
    nll_T = F.cross_entropy(logits_TV, batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    weights_T = batch.target_weights.flatten()
    weighted_T = nll_T * weights_T
    total = weighted_T.sum() / counts.targets
    sums = {"lm": weighted_T.detach().sum()}
    labels_T = batch.alignment_ids.flatten()
    for a, alignment in enumerate(alignments):
        mine_T = labels_T == a
        sums[f"lm/{alignment}"] = weighted_T.detach()[mine_T].sum()
        sums[f"targets/{alignment}"] = weights_T[mine_T].sum()
    if member_AE is not None:
        votes_T = votes(batch, recipe.vote)
        router = router_loss_sum(output.router_logits, labels_T, votes_T, member_AE)
        sums["router"] = router.detach()
        if recipe.loss_weight > 0:
            total = total + recipe.loss_weight * router / counts.votes
        sums.update(routing_sums(output.router_logits, labels_T, votes_T, member_AE, engine.module.config.num_experts_per_tok))
    return Losses(total * parts, sums)


def votes(batch: Batch, vote: str) -> Tensor:
    """Which tokens vote on the route, (T,) bool; padding never does."""
    roles_T = batch.roles.flatten()
    chosen_T = torch.zeros_like(roles_T, dtype=torch.bool)
    for role in ROLES_OF_VOTE[vote]:
        chosen_T |= roles_T == role
    return chosen_T & (roles_T != PADDING)
