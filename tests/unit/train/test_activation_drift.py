"""The drift of activations on DeepSpeed's own experts, without an engine: value, gradient, recomputation, padding, the probe."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts
from torch.utils.checkpoint import checkpoint

from h3scale.train.activation_drift import ActivationDrift, _HeldExperts
from h3scale.train.expert_compute import MATRICES, use_experts

HIDDEN, INNER, EXPERTS = 8, 12, 3
COUNTS = [8, 16, 8]  # as AutoEP gives them: padded to eights
TOKENS = [range(0, 5), range(8, 19), range(24, 24)]  # the rows that are tokens; the last expert has none
ROWS = 40  # after the last expert's there are rows of nobody
GAMMAS = [2.0, 0.5, 1.0]
SCALE, PARTS = 0.25, 4


class Case:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.experts = GroupedExperts(HIDDEN, INNER, EXPERTS, use_grouped_mm=False)
        use_experts(self.experts, "loop")
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.copy_(draw(*parameter.shape))
        self.start = {name: getattr(self.experts, name).detach() + 0.3 * draw(*shape) for name, shape in self.shapes().items()}
        self.inputs = torch.zeros(ROWS, HIDDEN)
        for rows in TOKENS:
            self.inputs[list(rows)] = draw(len(rows), HIDDEN)
        self.inputs.requires_grad_()
        self.counts = torch.tensor(COUNTS, dtype=torch.int32)

    def shapes(self) -> dict[str, torch.Size]:
        return {name: getattr(self.experts, name).shape for name in MATRICES}

    def hold(self) -> ActivationDrift:
        drift = ActivationDrift.__new__(ActivationDrift)
        drift.sum, drift.parts, drift.loss_scale = torch.zeros(()), PARTS, torch.zeros(())
        held: Any = [
            SimpleNamespace(shard=SimpleNamespace(name=f"x.{n}"), whole=lambda dtype, n=n: self.start[n].to(dtype))
            for n in MATRICES
        ]
        _HeldExperts(drift, self.experts, held, torch.tensor(GAMMAS))
        return drift

    def backward(self, drift: ActivationDrift | None, again: bool | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of input and weights of a loss on the output; `again`: checkpointed, reentrant or not."""
        call = self.experts if again is None else lambda *inputs: checkpoint(self.experts, *inputs, use_reentrant=again)
        loss = call(self.inputs, self.counts)[: sum(COUNTS)].sin().sum()
        (SCALE * (drift.attach(loss) if drift else loss)).backward()
        weights = [getattr(self.experts, name) for name in MATRICES]
        return self.inputs.grad, [weight.grad for weight in weights]

    def reference(self) -> tuple[float, list[torch.Tensor]]:
        """The term and its gradients, token by token in float64."""
        weights = {name: getattr(self.experts, name).detach().double().requires_grad_() for name in MATRICES}
        total = torch.zeros((), dtype=torch.float64)
        for e, rows in enumerate(TOKENS):
            for row in rows:
                x = self.inputs[row].detach().double()
                found, wanted = (
                    w["w2"][e] @ (F.silu(w["w1"][e] @ x) * (w["w3"][e] @ x))
                    for w in (weights, {name: start.double() for name, start in self.start.items()})
                )
                total = total + GAMMAS[e] * (found - wanted).square().sum() / wanted.square().sum()
        total.backward()
        return total.item(), [weights[name].grad for name in MATRICES]


@pytest.mark.parametrize("again", [None, False, True], ids=["kept", "recomputed", "recomputed reentrantly"])
def test_the_term_and_its_gradient_are_those_of_plain_autograd_and_counted_once(again: bool | None) -> None:
    plain_input, plain_weights = Case().backward(None)
    case = Case()
    drift = case.hold()
    found_input, found_weights = case.backward(drift, again)
    value, gradients = case.reference()
    assert drift.close_step().item() == pytest.approx(value, rel=1e-5)
    assert drift.close_step().item() == 0
    torch.testing.assert_close(found_input, plain_input, rtol=0, atol=0)  # the term moves no layer below
    for found, plain, gradient in zip(found_weights, plain_weights, gradients, strict=True):
        torch.testing.assert_close(found - plain, (SCALE * PARTS * gradient).float(), rtol=1e-4, atol=1e-5)


def test_rows_of_nobody_may_hold_anything() -> None:
    case = Case()
    drift = case.hold()
    plain = type(case.experts).forward

    def kernel(experts: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        output = plain(experts, rows, counts)
        return torch.cat([output[: sum(COUNTS)], torch.full_like(output[sum(COUNTS) :], torch.nan)])

    held = vars(case.experts)["forward"].__self__
    held.plain = lambda rows, counts: kernel(case.experts, rows, counts)
    case.backward(drift)
    assert drift.sum.item() == pytest.approx(case.reference()[0], rel=1e-5)
    assert all(parameter.grad.isfinite().all() for parameter in case.experts.parameters())


def test_nothing_is_added_in_evaluation() -> None:
    case = Case()
    case.hold()
    with torch.no_grad():
        wanted = type(case.experts).forward(case.experts, case.inputs, case.counts)
        assert torch.equal(case.experts(case.inputs, case.counts), wanted)
    case.experts.eval()
    output = case.experts(case.inputs, case.counts)
    assert "Hold" not in type(output.grad_fn).__name__
