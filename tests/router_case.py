"""Router logits with labels and votes, and what is to be known of the router's terms on them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from h3scale.config.recipe import RouterLoss
from h3scale.data.collate import PADDING, RESPONSE, Batch
from h3scale.model.expert_compute.in_transformers import use_experts
from h3scale.model.experts import ExpertMap
from h3scale.model.router import membership_AE
from h3scale.train.loss import Counts, compute_losses, votes_of
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


class Counting(TorchDispatchMode):
    """Operations of torch within that are no views and no allocations: each is a kernel at least."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and not str(function).startswith(ALLOCATES):
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def count_operations(case: RouterCase, function: Terms) -> Counter[str]:
    """Those of a step's router terms.

    Not counted is what autograd adds where the logits of a layer are used by its experts as well; MicroBatch counts that too.
    """
    leaves = [logits_TE.clone().requires_grad_() for logits_TE in case.logits_LTE]
    lm, outer = torch.zeros((), device=case.logits_LTE.device), torch.ones((), device=case.logits_LTE.device)
    with Counting() as counting:
        case.step(function, leaves, lm, outer)
    return counting.found


class MicroBatch:
    """A tiny mixture and a micro-batch of two rows, through transformers' forward, train.loss and backward."""

    def __init__(self, family: str, num_layers: int, dtype: torch.dtype, device: str = "cpu"):
        experts = ("helpful", "harmless", None)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "head_dim": 8, "vocab_size": 40}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, num_hidden_layers=num_layers, num_local_experts=len(experts), **sizes)
        self.module = AutoModelForCausalLM.from_config(config).to(dtype).to(device)  # `module`: as a DeepSpeed engine has it
        use_experts(self.module, "auto")
        self.member_AE = membership_AE(ExpertMap(("helpful", "harmless"), experts), device)
        ids_BS = torch.arange(2 * 12, device=device).view(2, 12)
        labels_BS = (ids_BS % 12 // 4) - 1
        roles_BS = torch.where(labels_BS < 0, PADDING, RESPONSE).to(torch.int8)
        self.batch = Batch(ids_BS, ids_BS % 4, ids_BS + 1, (labels_BS >= 0).float(), labels_BS, roles_BS, labels_BS)

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def step(self, has_router: bool) -> dict[str, Tensor]:
        """With the router's terms or without; the sums of both."""
        member_AE, recipe = self.member_AE if has_router else None, RouterLoss(loss_weight=0.1, z_weight=1e-3)
        losses = compute_losses(self, self.batch, Counts(16.0, 16), recipe, ["helpful", "harmless"], member_AE, 1)
        losses.total.backward()
        return losses.sums

    def added_operations(self) -> Counter[str]:
        """What the router's terms add to a step of the whole model."""
        found = []
        for has_router in (True, False):
            self.step(has_router)  # gradients are there from now on, and hooks of transformers
            with Counting() as counting:
                self.step(has_router)
            found.append(counting.found)
        found[0].subtract(found[1])
        return Counter({name: count for name, count in found[0].items() if count})
