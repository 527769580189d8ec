"""Router logits with labels and votes, and what is to be known of the router's terms on them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from h3scale.config.recipe import RouterLoss
from h3scale.data.collate import PADDING, RESPONSE
from h3scale.train.loss import votes_of
from h3scale.train.router_terms import Routed, RouterTerms

Terms = Callable[..., RouterTerms]
OUTER = 1.7  # what the loss is multiplied by on its way to the total
ALLOCATES = ("aten.empty", "aten.detach", "aten.alias")  # launch nothing


class RouterCase:
    """`owners`: the alignment of each expert, None for a general one. One token in five is padding, one in five does not vote."""

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        owners: list[int | None],
        top_k: int,
        dtype: torch.dtype,
        recipe: RouterLoss,
        seed: int = 0,
        device: str = "cpu",
    ):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_layers, num_tokens, len(owners))
        # No two logits of a token are alike, in bf16 neither, nor sums over layers: of two equal ones either may be taken.
        places = torch.rand(shape, generator=generator).argsort(-1)
        scales_L11 = torch.arange(2, num_layers + 2).sqrt().view(-1, 1, 1)
        self.logits_LTE = ((places * 0.75 - 1.5) * scales_L11).to(dtype).to(device)
        num_alignments = 1 + max(owner for owner in owners if owner is not None)
        self.member_AE = torch.tensor([[owner == a for owner in owners] for a in range(num_alignments)]).to(device)
        kind_T = torch.randint(0, 5, (num_tokens,), generator=generator)
        labels_T = torch.randint(0, num_alignments, (num_tokens,), generator=generator)
        self.labels_T = labels_T.where(kind_T > 0, -1).to(device)
        self.roles_T = torch.where(kind_T > 1, RESPONSE, PADDING).to(torch.int8).to(device)
        shares_LE = torch.rand(num_layers, len(owners), generator=generator, dtype=torch.float64).to(device)
        self.shares_LE = shares_LE if recipe.balance_weight > 0 else None
        self.top_k, self.recipe = top_k, recipe

    def terms(self, function: Terms) -> tuple[RouterTerms, Tensor]:
        """The terms, and the gradient of OUTER times their loss with respect to the logits (0 where it needs none)."""
        logits_LTE = self.logits_LTE.clone().requires_grad_()
        found = self._call(function, logits_LTE, votes_of(self.roles_T, "both"))
        if not found.loss.requires_grad:
            return found, torch.zeros_like(logits_LTE)
        (slope_LTE,) = torch.autograd.grad(found.loss * OUTER, logits_LTE)
        return found, slope_LTE

    def step(self, function: Terms, leaves: list[Tensor], lm: Tensor, outer: Tensor) -> None:
        """As in a step of training: from who votes to the gradient of each layer's logits."""
        found = self._call(function, torch.stack(leaves), votes_of(self.roles_T, "both"))
        total = torch.add(lm, found.loss, alpha=1 / len(self.labels_T))
        torch.autograd.grad(total, leaves, outer)

    def _call(self, function: Terms, logits_LTE: Tensor, votes_T: Tensor) -> RouterTerms:
        return function(logits_LTE, Routed(self.labels_T, votes_T, self.member_AE, self.recipe, self.top_k, self.shares_LE))


def count_operations(case: RouterCase, function: Terms) -> Counter[str]:
    """Operations of torch in a step that are no views and no allocations: each is a kernel at least.

    Not counted is what autograd adds where the logits of a layer are used by its experts as well.
    """

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not function.is_view and not str(function).startswith(ALLOCATES):
                self.found[str(function)] += 1
            return function(*args, **(kwargs or {}))

    leaves = [logits_TE.clone().requires_grad_() for logits_TE in case.logits_LTE]
    lm, outer = torch.zeros((), device=case.logits_LTE.device), torch.ones((), device=case.logits_LTE.device)
    with Counting() as counting:
        case.step(function, leaves, lm, outer)
    return counting.found
