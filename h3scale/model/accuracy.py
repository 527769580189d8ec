"""Which alignment a model's routers see in a record.

Shape suffixes: R records, T tokens, L layers, E experts, A alignments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from h3scale.model.router import alignment_log_probs


def record_log_probs(
    router_logits: Sequence[Tensor], record_ids_T: Tensor, response_mask_T: Tensor, member_AE: Tensor, num_records: int
) -> Tensor:
    """Sum over the layers and a record's response tokens of the alignments' log-probabilities, (R, A) fp32.

    The argmax over A is the record's predicted alignment. Sums of several batches with the same numbering of records
    may be added. A record without a marked token has a row of zeros.

    Args: router_logits: one (T, E) tensor a layer; record_ids_T: 0 to num_records - 1 where response_mask_T is True,
    anything elsewhere (padding is -1 in `data.encode.Batch`); member_AE: `model.router.membership_AE`.
    """
    member_AE = member_AE.to(router_logits[0].device)
    chosen_ids = record_ids_T[response_mask_T]
    sums_RA = torch.zeros(num_records, member_AE.shape[0], device=router_logits[0].device)
    for logits_TE in router_logits:
        sums_RA.index_add_(0, chosen_ids, alignment_log_probs(logits_TE[response_mask_T], member_AE))
    return sums_RA


def share_correct(log_probs_RA: Tensor, alignment_ids_R: Tensor, num_alignments: int) -> list[float | None]:
    """For each alignment, the share of its records whose argmax is right; None when it has no record."""
    predicted_R = log_probs_RA.argmax(-1)
    shares: list[float | None] = []
    for alignment_id in range(num_alignments):
        own = alignment_ids_R == alignment_id
        shares.append((predicted_R[own] == alignment_id).double().mean().item() if own.any() else None)
    return shares
