"""What the routers of a fused model do: whose record they think it is, and which experts they take.

Shape suffixes: T tokens, L layers, N records, E experts, A alignments.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from h3scale.data.collate import PADDING, PROMPT, RESPONSE, Batch
from h3scale.data.encode import Encoded
from h3scale.errors import DataError, UsageError
from h3scale.evaluation.score import Route
from h3scale.model.accuracy import record_log_probs, share_correct
from h3scale.model.experts import ExpertMap
from h3scale.model.router import alignment_log_probs, expert_weights, forced_routing, membership_AE

ROUTER_MODES = ("trained", "uniform", "oracle")


def uniform_weights(expert_map: ExpertMap) -> Tensor:
    """Every expert with the same weight, (E,)."""
    return torch.full((expert_map.num_experts,), 1.0 / expert_map.num_experts)


def route_for(model: Any, expert_map: ExpertMap | None, mode: str, asked: Iterable[str] = ()) -> Route | None:
    """What `score_encoded` needs to route by `mode`; None for the trained router.

    `uniform` averages all experts, `oracle` gives each record to the experts of its own alignment, and to all alike what has
    none. Raises UsageError (2) for a dense model, DataError (65) when an alignment of `asked` has no expert for oracle.
    """
    if mode == "trained":
        return None
    if expert_map is None:
        raise UsageError(f"--router {mode}: the model is dense and has no router (leave the option out)")
    weights_AE = torch.stack([expert_weights(expert_map, alignment) for alignment in expert_map.alignments])
    uniform_E = uniform_weights(expert_map)
    if mode == "uniform":
        return lambda alignment_ids: forced_routing(model, uniform_E)
    strange = sorted(set(asked) - set(expert_map.alignments))
    if strange:
        raise DataError(f"--router oracle: the model has no expert for {', '.join(strange)}")
    by_label = torch.cat([weights_AE, uniform_E[None]])  # the last row, label -1, is padding's too

    return lambda alignment_ids: forced_routing(model, by_label[alignment_ids.flatten()])


def route_for_alignment(model: Any, expert_map: ExpertMap | None, mode: str, alignment: str) -> AbstractContextManager[None]:
    """The route of `mode` while generating for prompts that are all of one alignment."""
    if expert_map is None or mode == "trained":
        return nullcontext()
    weights_E = uniform_weights(expert_map) if mode == "uniform" else expert_weights(expert_map, alignment)
    return forced_routing(model, weights_E)


class RoutingTally:
    """Adds up, record by record, what the router logits of each batch say; `summarise` then counts any choice of records.

    Votes are the logits at the response tokens. Choices are the top k of all experts at every prompt and response token,
    as transformers takes them; under a forced route they are what the router would have taken.
    """

    def __init__(self, expert_map: ExpertMap, encoded: Sequence[Encoded], top_k: int):
        self.expert_map, self.top_k = expert_map, top_k
        self.member_AE = membership_AE(expert_map)
        label_of = {alignment: i for i, alignment in enumerate(expert_map.alignments)}
        self.labels_N = torch.tensor([label_of.get(item.record.alignment, -1) for item in encoded])
        num_records, num_alignments = len(encoded), len(expert_map.alignments)
        self.votes_LNA = torch.zeros(0, num_records, num_alignments, dtype=torch.float64)
        self.last_prompt_NA = torch.zeros(num_records, num_alignments)
        self.token_votes_NA = torch.zeros(num_records, num_alignments, dtype=torch.long)
        self.choices_LNE = torch.zeros(0, num_records, expert_map.num_experts, dtype=torch.long)

    def observe(self, router_logits: Sequence[Tensor], batch: Batch) -> None:
        """Takes one batch: one raw (T, E) tensor a layer."""
        if not len(self.votes_LNA):
            self.votes_LNA = self.votes_LNA.new_zeros(len(router_logits), *self.votes_LNA.shape[1:])
            self.choices_LNE = self.choices_LNE.new_zeros(len(router_logits), *self.choices_LNE.shape[1:])
        record_ids_T, roles_T = batch.record_ids.flatten(), batch.roles.flatten()
        response_T = roles_T == RESPONSE
        num_records = len(self.labels_N)
        for layer, logits_TE in enumerate(router_logits):
            self.votes_LNA[layer] += record_log_probs([logits_TE], record_ids_T, response_T, self.member_AE, num_records)
            self._count_choices(layer, logits_TE, record_ids_T, roles_T != PADDING)
        log_probs_TA = torch.stack([alignment_log_probs(logits, self.member_AE) for logits in router_logits]).sum(0)
        voted_TA = torch.zeros_like(log_probs_TA, dtype=torch.long)
        voted_TA.scatter_(1, log_probs_TA.argmax(-1, keepdim=True), 1)
        self.token_votes_NA.index_add_(0, record_ids_T[response_T], voted_TA[response_T])
        last_T = (roles_T == PROMPT) & (roles_T.roll(-1) == RESPONSE)
        self.last_prompt_NA[record_ids_T[last_T]] = log_probs_TA[last_T]

    def _count_choices(self, layer: int, logits_TE: Tensor, record_ids_T: Tensor, real_T: Tensor) -> None:
        chosen_TK = logits_TE.float().softmax(-1).topk(self.top_k, dim=-1).indices[real_T]
        flat = record_ids_T[real_T].unsqueeze(-1) * self.expert_map.num_experts + chosen_TK
        counts = torch.bincount(flat.flatten(), minlength=self.choices_LNE[layer].numel())
        self.choices_LNE[layer] += counts.view_as(self.choices_LNE[layer])

    def summarise(self, kept: Sequence[int]) -> dict[str, Any]:
        """Everything about the records with these indices, as JSON; shares are of 1, accuracies macro over alignments.

        accuracy: per record, all layers together. per_layer: per record by one layer alone. per_token: each response
        token by itself. confusion: records by true, then predicted alignment. tokens_per_expert: (token, layer)
        choices by the record's alignment, then expert.
        """
        labelled = [index for index in kept if self.labels_N[index] >= 0]
        ids = torch.tensor(labelled, dtype=torch.long)
        labels_N = self.labels_N[ids]
        votes_LNA = self.votes_LNA[:, ids]
        total_NA = votes_LNA.sum(0)
        experts = zip(self.expert_map.names(), self.expert_map.experts, strict=True)
        return {
            "top_k": self.top_k,
            "alignments": list(self.expert_map.alignments),
            "experts": [{"name": name, "alignment": alignment} for name, alignment in experts],
            **self._accuracy(total_NA, labels_N),
            "per_token": self._per_token(self.token_votes_NA[ids], labels_N),
            "per_layer": [self._accuracy(votes_NA, labels_N) for votes_NA in votes_LNA],
            "last_prompt_token": self._accuracy(self.last_prompt_NA[ids], labels_N),
            "confusion": self._confusion(total_NA.argmax(-1), labels_N),
            "tokens_per_expert": self._load(self.choices_LNE[:, ids].sum(0), labels_N),
            "load_per_layer": self._load_per_layer(ids),
        }

    def _accuracy(self, log_probs_NA: Tensor, labels_N: Tensor) -> dict[str, Any]:
        return self._with_macro(share_correct(log_probs_NA, labels_N, len(self.expert_map.alignments)))

    def _with_macro(self, shares: Sequence[float | None]) -> dict[str, Any]:
        present = {a: share for a, share in zip(self.expert_map.alignments, shares, strict=True) if share is not None}
        return {"accuracy": present, "macro": sum(present.values()) / len(present) if present else None}

    def _each(self, labels_N: Tensor, of: Callable[[int, Tensor], Any]) -> dict[str, Any]:
        """`of(label, mask)` for every alignment that has records."""
        masks = {a: (label, labels_N == label) for label, a in enumerate(self.expert_map.alignments)}
        return {alignment: of(label, mask_N) for alignment, (label, mask_N) in masks.items() if mask_N.any()}

    def _per_token(self, token_votes_NA: Tensor, labels_N: Tensor) -> dict[str, Any]:
        def share(label: int, mask_N: Tensor) -> float:
            votes_A = token_votes_NA[mask_N].sum(0)
            return (votes_A[label] / votes_A.sum()).item()

        accuracy = self._each(labels_N, share)
        return {"accuracy": accuracy, "macro": sum(accuracy.values()) / len(accuracy) if accuracy else None}

    def _confusion(self, predicted_N: Tensor, labels_N: Tensor) -> dict[str, dict[str, int]]:
        def counts(_label: int, mask_N: Tensor) -> dict[str, int]:
            found = torch.bincount(predicted_N[mask_N], minlength=len(self.expert_map.alignments)).tolist()
            return dict(zip(self.expert_map.alignments, found, strict=True))

        return self._each(labels_N, counts)

    def _load(self, choices_NE: Tensor, labels_N: Tensor) -> dict[str, dict[str, int]]:
        names = self.expert_map.names()
        return self._each(labels_N, lambda _, mask_N: dict(zip(names, choices_NE[mask_N].sum(0).tolist(), strict=True)))

    def _load_per_layer(self, ids: Tensor) -> list[dict[str, float]]:
        counts_LE = self.choices_LNE[:, ids].sum(1).double()
        shares_LE = (counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)).tolist()
        return [dict(zip(self.expert_map.names(), shares, strict=True)) for shares in shares_LE]
