"""Load balancing among the experts of one alignment. Shape suffixes: L layers, T tokens, E experts, A alignments."""

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.config.recipe import RouterLoss
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap


class Balance:
    """How the tokens of each alignment were shared out among its experts in the global batch before this one.

    `shares_LE`: for every expert the share of its alignment's voting tokens that it was first choice of (among that
    alignment's experts), 0 for general ones; equal shares before the first step. Float64, the same on every rank.
    """

    def __init__(self, member_AE: Tensor, num_layers: int):
        self.member_AE = member_AE
        sizes_A = member_AE.sum(-1, keepdim=True, dtype=torch.float64)
        self.shares_LE = (member_AE / sizes_A).sum(0).expand(num_layers, -1).clone()
        self.before_LE = self.shares_LE
        self.chosen_LE = torch.zeros_like(self.shares_LE)

    def add(self, chosen_LE: Tensor) -> None:
        """Counts the first choices of one micro-batch (model.router.first_choices)."""
        self.chosen_LE += chosen_LE

    def close_step(self) -> None:
        """Makes the shares of the next step. One all-reduce of L x E numbers: every rank calls this."""
        dist.all_reduce(self.chosen_LE)
        together_AEE = self.member_AE.unsqueeze(-1) & self.member_AE.unsqueeze(-2)
        tokens_LE = self.chosen_LE @ together_AEE.any(0).double()  # of the expert's alignment
        shares_LE = self.chosen_LE / tokens_LE.clamp_min(1)
        self.before_LE = self.shares_LE
        self.shares_LE = torch.where(tokens_LE > 0, shares_LE, self.shares_LE)  # no token of it in this batch: as before
        self.chosen_LE = torch.zeros_like(self.shares_LE)

    def undo_step(self) -> None:
        """The shares as they were before `close_step`."""
        self.shares_LE = self.before_LE


def check_balance(recipe: RouterLoss, expert_map: ExpertMap) -> None:
    """ConfigError (78) for a balance_weight where every alignment has one expert: the loss would be a constant."""
    if recipe.balance_weight > 0 and len(expert_map.labelled) == len(expert_map.alignments):
        raise ConfigError(
            f"router.balance_weight: {recipe.balance_weight}, but every alignment of the model has one expert, so there is nothing "
            "to balance (works: 0, or a model with several experts of an alignment)"
        )
