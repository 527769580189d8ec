"""What losses remember from step to step: where the experts started, and how their load was shared."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from h3scale.config.recipe import TrainRecipe
from h3scale.model.router import membership_AE
from h3scale.train.activation_drift import ActivationDrift
from h3scale.train.anchor import Anchor, DriftAnchor, expert_gammas
from h3scale.train.balance import Balance
from h3scale.train.engine import Run


@dataclass
class LossMemory:
    """Either is None where the recipe gives it no weight, or the model is dense."""

    anchor: Anchor | None = None
    balance: Balance | None = None

    def attach(self, total: Tensor) -> Tensor:
        """The loss of a micro-batch on its way to backward."""
        return self.anchor.attach(total) if self.anchor else total

    def close_step(self) -> dict[str, Tensor]:
        """After the last backward of a step, before engine.step; every rank calls this. Sums of this rank for the log."""
        if self.balance:
            self.balance.close_step()
        return {"drift": self.anchor.close_step()} if self.anchor else {}

    def undo_step(self) -> None:
        """After `close_step` of a step that is left out: nothing is remembered of it."""
        if self.balance:
            self.balance.undo_step()

    def state(self) -> dict[str, Tensor]:
        """What a run has to keep of it, the same on every rank. Where the experts started is read again from the model."""
        return {"balance": self.balance.shares_LE} if self.balance else {}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state`. A part that the run did not have (its weight was 0) begins anew."""
        if self.balance and "balance" in state:
            self.balance.shares_LE = state["balance"].to(self.balance.shares_LE)


def make_loss_memory(recipe: TrainRecipe, run: Run) -> LossMemory:
    """The memory of a run that begins: the experts are where they start."""
    if run.expert_map is None:
        return LossMemory()
    balance = None
    if recipe.router.balance_weight > 0:
        balance = Balance(membership_AE(run.expert_map, run.engine.device), run.config.num_hidden_layers)
    return LossMemory(_anchor(recipe, run), balance)


def _anchor(recipe: TrainRecipe, run: Run) -> Anchor | None:
    assert run.expert_map is not None
    if not any(expert_gammas(recipe.drift, run.expert_map)):
        return None
    where = (run.engine, recipe.drift, run.expert_map, run.moe_type, run.config.num_hidden_layers)
    if recipe.drift.kind == "weights":
        return DriftAnchor(*where)
    num_routed = recipe.data.rows_per_batch * recipe.data.sequence_length * run.config.num_experts_per_tok
    return ActivationDrift(*where, num_routed, run.world_size * run.micro_batches)
