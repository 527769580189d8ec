"""A layer of experts as any backend computes it, beside the same in float64, token by token; on any device.

Shape suffixes: T tokens, K choices a token, R = T x K rows sorted by expert, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from h3scale.model.expert_compute import Backend
from h3scale.model.expert_compute.layer import mix

# Of the norm of each result, for CHOICES, which make none of them a small difference of large numbers. bf16 rounds by 2^-9 on
# average at most; four roundings follow each other, and the gradient of a router is a difference of products of such.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROUTER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# Of the norm of what is added up to each result, without the signs. Of bf16 six roundings follow each other, to 2^-8 each at
# worst (products are summed in fp32); of fp32 the sums' own count as well.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6 * 2**-8}
CHOICES = {
    "balanced": [[t % 3, (t + 1) % 3] for t in range(48)],
    "skewed": [[0, 1] if t % 8 else [1, 2] for t in range(48)],
    "an expert without tokens": [[0, 2] for _ in range(48)],
    "one token": [[2, 0]],
}
NAMES = ("output", "hidden", "router", "w1", "w2", "w3")


@dataclass
class Case:
    """`chosen`: for each token its experts. Weights of the choices are the softmax over their router logits."""

    chosen: list[list[int]]
    experts: int
    hidden: int
    inner: int
    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0

    def inputs(self) -> list[Tensor]:
        """hidden (T, H), router (E, H), w1 (E, I, H), w2 (E, H, I), w3 (E, I, H), and the gradient of the output (T, H)."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens, width, inner = (len(self.chosen), self.hidden), (self.hidden,), (self.experts, self.inner, self.hidden)
        shapes = [tokens, (self.experts, *width), inner, (self.experts, self.hidden, self.inner), inner, tokens]
        scales = [1.0, *[shape[-1] ** -0.5 for shape in shapes[1:5]], 1.0]
        drawn = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
        return [value.to(self.dtype).to(self.device) for value in drawn]

    def weights(self, hidden_TH: Tensor, router_EH: Tensor) -> Tensor:
        chosen_TK = torch.tensor(self.chosen, device=hidden_TH.device)
        return (hidden_TH @ router_EH.T).gather(1, chosen_TK).to(torch.promote_types(self.dtype, torch.float32)).softmax(-1)

    def found(self, backend: Backend, stacked: bool) -> dict[str, Tensor]:
        """Output and all gradients. `stacked`: gate above up in one tensor, as transformers has them."""
        *leaves, grad_TH = self.inputs()
        hidden, router, w1, w2, w3 = (leaf.requires_grad_() for leaf in leaves)
        ups = (torch.cat([w1, w3], dim=1), None) if stacked else (w1, w3)
        chosen_TK = torch.tensor(self.chosen, device=self.device)
        output = mix(backend, hidden, chosen_TK, self.weights(hidden, router), ups[0], w2, ups[1])
        output.backward(grad_TH)
        return dict(zip(NAMES, [output.detach(), *[leaf.grad for leaf in leaves]], strict=True))  # type: ignore[list-item]

    def reference(self) -> dict[str, Tensor]:
        *leaves, grad_TH = [value.double().cpu() for value in self.inputs()]
        hidden, router, w1, w2, w3 = (leaf.requires_grad_() for leaf in leaves)
        rows = []
        for x_H, chosen in zip(hidden, self.chosen, strict=True):
            shares = (router[chosen] @ x_H).softmax(-1)
            answers = [w2[e] @ (F.silu(w1[e] @ x_H) * (w3[e] @ x_H)) for e in chosen]
            rows.append(sum(share * answer for share, answer in zip(shares, answers, strict=True)))
        output = torch.stack(rows)
        output.backward(grad_TH)
        return dict(zip(NAMES, [output.detach(), *[leaf.grad for leaf in leaves]], strict=True))  # type: ignore[list-item]

    def magnitudes(self) -> dict[str, Tensor]:
        """The same with all terms of all sums positive, so that nothing cancels: what rounding errors are in proportion to."""
        hidden_signed, router_signed, w1_signed, _, w3_signed, _ = signed = [value.double().cpu() for value in self.inputs()]
        *leaves, grad_TH = [value.abs() for value in signed]
        hidden, router, w1, w2, w3 = (leaf.requires_grad_() for leaf in leaves)
        rows = []
        for t, chosen in enumerate(self.chosen):
            shares = (router_signed[chosen] @ hidden_signed[t]).softmax(-1)
            slopes = shares.diag() + shares.outer(shares)
            shares = _as(shares, slopes @ (router[chosen] @ hidden[t]))
            answers = []
            for e in chosen:
                gate, up = w1_signed[e] @ hidden_signed[t], w3_signed[e] @ hidden_signed[t]
                slope = gate.sigmoid() * (1 + gate.abs() * (-gate).sigmoid())
                activated = _as(F.silu(gate).abs(), slope * (w1[e] @ hidden[t]))
                answers.append(w2[e] @ (activated * _as(up.abs(), w3[e] @ hidden[t])))
            rows.append(sum(share * answer for share, answer in zip(shares, answers, strict=True)))
        output = torch.stack(rows)
        output.backward(grad_TH)
        return dict(zip(NAMES, [output.detach(), *[leaf.grad for leaf in leaves]], strict=True))  # type: ignore[list-item]

    def check(self, backend: Backend, stacked: bool = False) -> None:
        """AssertionError with the name of what is off by more than its tolerance."""
        wanted = self.reference()
        for name, error in self._errors(backend, stacked, wanted, wanted).items():
            assert error <= (ROUTER_TOLERANCE if name == "router" else TOLERANCE)[self.dtype], (name, error)

    def check_rounding(self, backend: Backend, stacked: bool = False) -> None:
        """The same where results may be small differences of large numbers, as they are for some routings of few tokens."""
        for name, error in self._errors(backend, stacked, self.reference(), self.magnitudes()).items():
            assert error <= ROUNDING[self.dtype], (name, error)

    def _errors(self, backend: Backend, stacked: bool, wanted: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, float]:
        norm = torch.linalg.norm
        return {
            name: (norm(value.double().cpu() - wanted[name]) / norm(scales[name]).clamp_min(1e-30)).item()
            for name, value in self.found(backend, stacked).items()
        }


def _as(value: Tensor, terms: Tensor) -> Tensor:
    """`value`, with the gradient of `terms`."""
    return terms - terms.detach() + value
