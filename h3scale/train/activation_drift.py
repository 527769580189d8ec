"""The drift of what experts compute: how far an expert's outputs are from those of its start, on the same inputs.

drift = (1/L) * sum over layers of (1/N) * sum over the tokens x routed to expert e of gamma_e * |E(x) - E0(x)|^2 / |E0(x)|^2,
where N is the number of routed tokens of the global batch (rows x tokens a row x top_k: known beforehand, so no split into
ranks and micro-batches changes the loss). AutoEP routes the padding at the end of rows as well, so it is counted.
x is held constant: the term moves the experts, not the layers below. This is the later versions' reading of H3Fusion
(distance of embeddings); the first version's is the weights' (train.anchor).

The start E0 is gathered layer by layer, in the forward of DeepSpeed's GroupedExperts. The gradient goes in there too, by a
function that is the identity on the experts' output: a term kept aside until the loss is made would lose its gradient
under reentrant activation checkpointing, and the ZeRO-3 weights it needs would be gone when its turn comes.

Shape suffixes: R rows (tokens sorted by expert, padded), H hidden, E this rank's experts.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from h3scale.config.recipe import Drift
from h3scale.model.experts import ExpertMap
from h3scale.train.anchor import Anchor, Held
from h3scale.train.expert_compute import MATRICES

SMALLEST_MEAN_SQUARE = 1e-8  # of E0(x): below, an output is as good as none, and a distance relative to it means nothing


class ActivationDrift(Anchor):
    """Holds the outputs of the experts of a DeepSpeed engine; it stays in the forward of the engine's experts.

    `num_routed`: tokens x top_k of a global batch. `parts`: ranks x micro-batches of a step, which DeepSpeed averages over.
    """

    def __init__(
        self, engine: Any, recipe: Drift, expert_map: ExpertMap, moe_type: str, num_layers: int, num_routed: int, parts: int
    ):
        super().__init__(engine, recipe, expert_map, moe_type, num_layers)
        self.parts = parts
        self.loss_scale = torch.zeros(())
        self.sum = torch.zeros((), device=self.device)
        by_experts: dict[str, list[Held]] = {}
        for held in self.held:
            by_experts.setdefault(held.shard.name.rsplit(".", 1)[0], []).append(held)
        for name, matrices in by_experts.items():
            experts = engine.module.get_submodule(name)
            first = engine.module.get_submodule(name.rsplit(".", 1)[0]).ep_rank * experts.num_experts
            factors = [gamma / (num_layers * num_routed) for gamma in self.gammas[first : first + experts.num_experts]]
            if any(factors):
                _HeldExperts(self, experts, matrices, torch.tensor(factors, device=self.device))

    def attach(self, total: Tensor) -> Tensor:
        """The loss itself; its gradient, when it comes, says how DeepSpeed scales losses."""
        return _NoteScale.apply(total, self)

    def close_step(self) -> Tensor:
        value, self.sum = self.sum, torch.zeros_like(self.sum)
        return value


class _HeldExperts:
    """The experts of one layer with the term in their forward."""

    def __init__(self, drift: ActivationDrift, experts: nn.Module, matrices: Sequence[Held], factor_E: Tensor):
        self.drift, self.experts, self.factor_E = drift, experts, factor_E
        self.matrices = {held.shard.name.rsplit(".", 1)[1]: held for held in matrices}
        self.plain = experts.forward
        experts.forward = self.forward

    def forward(self, input_RH: Tensor, counts_E: Tensor) -> Tensor:
        output_RH = self.plain(input_RH, counts_E)
        if not (self.experts.training and torch.is_grad_enabled()):
            return output_RH
        input_RH = input_RH.detach()
        value, push_RH = self._distance(input_RH, output_RH.detach(), counts_E)
        weights = (getattr(self.experts, name) for name in MATRICES)
        return _Hold.apply(self, output_RH, input_RH, counts_E, value, push_RH, *weights)

    @torch.no_grad()
    def _distance(self, input_RH: Tensor, output_RH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """The term of these rows, a scalar, and its gradient by the output, (R, H).

        Rows that pad an expert's tokens are zeros, of which every expert makes zeros: they cost nothing. Rows after the last
        expert's are whatever the kernel left there.
        """
        start = {name: self.matrices[name].whole(output_RH.dtype) for name in MATRICES}
        start_RH = run(self.experts, start, input_RH, counts_E).float()
        row_R = torch.arange(len(input_RH), device=input_RH.device)
        expert_R = torch.searchsorted(counts_E.cumsum(0), row_R, right=True)
        factor_R = torch.cat([self.factor_E, self.factor_E.new_zeros(1)])[expert_R]
        is_routed_R1 = (expert_R < len(self.factor_E)).unsqueeze(-1)
        gap_RH = torch.where(is_routed_R1, output_RH.float() - start_RH, 0)
        size_R = torch.where(is_routed_R1, start_RH, 0).square().mean(-1).clamp_min(SMALLEST_MEAN_SQUARE)
        value = (factor_R * gap_RH.square().mean(-1) / size_R).sum()
        push_RH = (2 * factor_R / (size_R * gap_RH.shape[-1])).unsqueeze(-1) * gap_RH
        return value, push_RH.to(output_RH.dtype)

    def gradients(self, input_RH: Tensor, counts_E: Tensor, push_RH: Tensor) -> list[Tensor]:
        """The gradients of w1, w2, w3 that `push_RH`, a gradient by the output, makes; the experts are computed again."""
        weights = {name: getattr(self.experts, name).detach().requires_grad_() for name in MATRICES}
        with torch.enable_grad():
            output_RH = run(self.experts, weights, input_RH, counts_E)
        return list(torch.autograd.grad(output_RH, list(weights.values()), push_RH))


class _Hold(torch.autograd.Function):
    """The experts' output unchanged; in backward the term's gradient joins in, and the term is counted.

    Counted there, it is counted once, however often the forward is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        held: _HeldExperts,
        output_RH: Tensor,
        input_RH: Tensor,
        counts_E: Tensor,
        value: Tensor,
        push_RH: Tensor,
        *_: Tensor,
    ) -> Tensor:
        ctx.held = held
        ctx.save_for_backward(input_RH, counts_E, value, push_RH)
        return output_RH.view_as(output_RH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        input_RH, counts_E, value, push_RH = ctx.saved_tensors
        drift = ctx.held.drift
        drift.sum += value
        push_RH = (push_RH.float() * (drift.loss_scale * drift.parts)).to(push_RH.dtype)
        weights = ctx.held.gradients(input_RH, counts_E, push_RH)
        return None, gradients[0], None, None, None, None, *weights


class _NoteScale(torch.autograd.Function):
    """The loss unchanged; its gradient is kept, which comes before all others."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, drift: ActivationDrift) -> Tensor:
        ctx.drift = drift
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.drift.loss_scale = gradients[0].detach()
        return gradients[0], None


def run(experts: nn.Module, weights: dict[str, Tensor], input_RH: Tensor, counts_E: Tensor) -> Tensor:
    """What DeepSpeed's experts compute with other weights, on the same kernels, without any hooks; (R, H)."""
    settings = {name: value for name, value in vars(experts).items() if not name.startswith("_") and name != "forward"}
    stand_in: Any = SimpleNamespace(**settings, **weights)
    return type(experts).forward(stand_in, input_RH, counts_E)
