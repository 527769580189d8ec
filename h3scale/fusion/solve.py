"""From hidden states and labels to router rows, one layer like the other. No model here.

Everything is fp64. A solver is fed by `add`, piece by piece, then asked for `rows`: one (A, H) a layer whose rows sum to
zero, so that the row of zeros of a general expert scores the mean of the labelled ones.

Shape suffixes: T tokens, H hidden_size, E experts, A alignments.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from h3scale.model.router import alignment_log_probs

_LOG_SCALES = (math.log(1e-3), math.log(1e5))  # where the one scale is looked for
_GOLDEN = (math.sqrt(5) - 1) / 2


class Solver(Protocol):
    """What `fit_router` feeds and asks."""

    def add(self, layer: int, alignment_id: int, hidden_TH: Tensor, is_prompt_T: Tensor) -> None:
        """Takes some tokens' router inputs of one layer and one alignment."""

    def rows(self) -> list[Tensor]:
        """One (A, H) a layer."""


class Ridge:
    """Closed-form ridge regression of one-hot labels, from sums only: memory does not grow with the tokens.

    W = (X^T C X + lambda I)^-1 X^T C Y with C = 1/n_a for a token of alignment a, Y one-hot minus 1/A, and
    lambda = ridge * trace(X^T C X) / H, so that `ridge` means the same at every size. Needs H^2 + A H numbers a layer.
    """

    def __init__(self, num_layers: int, tokens_per_alignment: Sequence[int], ridge: float):
        self.ridge, self.tokens_per_alignment = ridge, tokens_per_alignment
        self.gram_LHH: list[Tensor | None] = [None] * num_layers
        self.mean_LAH: list[list[Tensor | None]] = [[None] * len(tokens_per_alignment) for _ in range(num_layers)]

    def add(self, layer: int, alignment_id: int, hidden_TH: Tensor, is_prompt_T: Tensor) -> None:
        weight = 1.0 / self.tokens_per_alignment[alignment_id]
        self.gram_LHH[layer] = _plus(self.gram_LHH[layer], (hidden_TH.T @ hidden_TH) * weight)
        self.mean_LAH[layer][alignment_id] = _plus(self.mean_LAH[layer][alignment_id], hidden_TH.sum(0) * weight)

    def rows(self) -> list[Tensor]:
        solved = []
        for gram_HH, means in zip(self.gram_LHH, self.mean_LAH, strict=True):
            assert gram_HH is not None
            means_AH = torch.stack([mean_H for mean_H in means if mean_H is not None])
            ridge = self.ridge * gram_HH.trace() / len(gram_HH)
            eye_HH = torch.eye(len(gram_HH), dtype=gram_HH.dtype, device=gram_HH.device)
            # Every row of Y is one-hot minus 1/A, so X^T C Y is the alignments' mean states minus the mean of these.
            solved.append(torch.linalg.solve(gram_HH + ridge * eye_HH, _centred(means_AH).T).T)
        return solved


class Logistic:
    """Multinomial logistic regression without bias, L2 penalty as in `Ridge`, alignments weighted equally.

    Keeps every hidden state it is given (fp32).
    """

    def __init__(self, num_layers: int, num_alignments: int, ridge: float):
        self.ridge = ridge
        self.hidden: list[list[list[Tensor]]] = [[[] for _ in range(num_alignments)] for _ in range(num_layers)]

    def add(self, layer: int, alignment_id: int, hidden_TH: Tensor, is_prompt_T: Tensor) -> None:
        self.hidden[layer][alignment_id].append(hidden_TH.float())

    def rows(self) -> list[Tensor]:
        return [self._fit([torch.cat(pieces).double() for pieces in by_alignment]) for by_alignment in self.hidden]

    def _fit(self, hidden_by_alignment: list[Tensor]) -> Tensor:
        num_alignments = len(hidden_by_alignment)
        hidden_TH = torch.cat(hidden_by_alignment)
        labels_T = torch.cat([torch.full((len(h),), a) for a, h in enumerate(hidden_by_alignment)]).to(hidden_TH.device)
        weights_T = torch.cat([h.new_full((len(h),), 1.0 / len(h) / num_alignments) for h in hidden_by_alignment])
        ridge = self.ridge * (weights_T @ hidden_TH.square().sum(1)) / hidden_TH.shape[1]
        rows_AH = hidden_TH.new_zeros(num_alignments, hidden_TH.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [rows_AH], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            nll_T = torch.nn.functional.cross_entropy(hidden_TH @ rows_AH.T, labels_T, reduction="none")
            total = weights_T @ nll_T + 0.5 * ridge * rows_AH.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimizer.step(loss)
        return _centred(rows_AH.detach())


class PromptMean:
    """An alignment's mean router input over its prompts, minus the mean over the alignments, of length 1.

    mergekit-moe's "hidden" gates, with the state that the router really sees (after the norm) and centred.
    """

    def __init__(self, num_layers: int, num_alignments: int):
        self.sums: list[list[Tensor | None]] = [[None] * num_alignments for _ in range(num_layers)]
        self.counts = [[0] * num_alignments for _ in range(num_layers)]

    def add(self, layer: int, alignment_id: int, hidden_TH: Tensor, is_prompt_T: Tensor) -> None:
        self.sums[layer][alignment_id] = _plus(self.sums[layer][alignment_id], hidden_TH[is_prompt_T].sum(0))
        self.counts[layer][alignment_id] += int(is_prompt_T.sum())

    def rows(self) -> list[Tensor]:
        solved = []
        for sums, counts in zip(self.sums, self.counts, strict=True):
            means_AH = torch.stack([sum_H / max(1, n) for sum_H, n in zip(sums, counts, strict=True) if sum_H is not None])
            solved.append(_centred(torch.nn.functional.normalize(_centred(means_AH), dim=1)))
        return solved


def best_scale(logits: Sequence[Sequence[Tensor]], member_AE: Tensor) -> tuple[float, float]:
    """The positive factor for all logits with the lowest token NLL, and that NLL; `logits[layer][alignment_id]` is (T, E).

    Layers and alignments weigh equally. The NLL is convex in the factor, so a golden-section search over its logarithm
    cannot be caught in a local minimum.
    """

    def nll(log_scale: float) -> float:
        parts = [
            -alignment_log_probs(logits_TE * math.exp(log_scale), member_AE)[:, alignment_id].double().mean()
            for by_alignment in logits
            for alignment_id, logits_TE in enumerate(by_alignment)
        ]
        return torch.stack(parts).mean().item()

    best = golden_section(nll, *_LOG_SCALES)
    return math.exp(best), nll(best)


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-3) -> float:
    """Where a function with one valley between `low` and `high` is lowest, to `tolerance`."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _centred(rows_AH: Tensor) -> Tensor:
    return rows_AH - rows_AH.mean(0)
