"""What is counted about the routing of a micro-batch, on the device and without a wait.

Shape suffixes: T tokens, L layers, E experts, K experts a token takes, A alignments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.model.router import alignment_log_probs


@torch.no_grad()
def routing_sums(
    router_logits: Sequence[Tensor], labels_T: Tensor, votes_T: Tensor, member_AE: Tensor, top_k: int
) -> dict[str, Tensor]:
    """Sums over this micro-batch's tokens, to be added over micro-batches and ranks.

    votes_A: tokens that vote. routed_A: of these the right ones, whose log-probabilities summed over layers favour their
    own alignment. router_A: router loss of the votes, mean over layers. tokens_per_expert_LE: the prompt and response tokens
    that each expert takes; padding (label -1) is routed too, but no record's.
    """
    logits_LTE = torch.stack(tuple(router_logits)).float()
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
