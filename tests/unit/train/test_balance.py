"""The shares of the global batch before: how they start, what a step makes of them, and where balancing is refused."""

import pytest
import torch

from h3scale.config.recipe import RouterLoss
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap
from h3scale.model.router import first_choices, membership_AE
from h3scale.train import balance as module
from h3scale.train.balance import Balance, check_balance
from h3scale.train.loss_memory import LossMemory

MAP = ExpertMap(("a", "b"), ("a", "b", None, "a", "a"))
LAYERS = 2


@pytest.fixture
def balance(monkeypatch: pytest.MonkeyPatch) -> Balance:
    """On the first of two ranks that both see the same tokens."""
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    return Balance(membership_AE(MAP), LAYERS)


def tokens(choices: list[int]) -> torch.Tensor:
    """First choices of tokens that have these experts as first choice in both layers, and one more that does not vote."""
    logits_TE = torch.eye(MAP.num_experts)[[*choices, 0]]
    labels_T = torch.tensor([MAP.alignments.index(MAP.experts[e] or "a") for e in choices] + [-1])
    return first_choices(torch.stack([logits_TE] * LAYERS), labels_T, labels_T >= 0, membership_AE(MAP))


def test_before_the_first_step_the_experts_of_an_alignment_have_equal_shares(balance: Balance) -> None:
    assert balance.shares_LE.tolist() == [[1 / 3, 1, 0, 1 / 3, 1 / 3]] * LAYERS


def test_a_step_gives_the_shares_of_all_its_micro_batches(balance: Balance) -> None:
    balance.add(tokens([0, 0, 1]))
    balance.add(tokens([0, 3, 1, 1]))
    assert balance.shares_LE[0, 0] == 1 / 3  # not before the step is over
    balance.close_step()
    assert balance.shares_LE.tolist() == [[0.75, 1, 0, 0.25, 0]] * LAYERS
    balance.add(tokens([4]))
    balance.close_step()
    assert balance.shares_LE.tolist() == [[0, 1, 0, 0, 1]] * LAYERS


def test_an_alignment_that_a_batch_lacks_keeps_its_shares(balance: Balance) -> None:
    balance.add(tokens([0, 4]))
    balance.close_step()
    balance.add(tokens([1]))
    balance.close_step()
    assert balance.shares_LE.tolist() == [[0.5, 1, 0, 0, 0.5]] * LAYERS


def test_the_shares_can_be_saved_and_loaded(balance: Balance) -> None:
    balance.add(tokens([0, 4]))
    balance.close_step()
    other = Balance(membership_AE(MAP), LAYERS)
    LossMemory(None, other).resume(LossMemory(None, balance).state())
    assert torch.equal(other.shares_LE, balance.shares_LE)
    LossMemory(None, other).resume({})  # of a run without this loss
    assert torch.equal(other.shares_LE, balance.shares_LE)


def test_balancing_is_refused_where_every_alignment_has_one_expert() -> None:
    single = ExpertMap(("a", "b"), ("b", "a", None, None))
    with pytest.raises(ConfigError, match=r"router\.balance_weight: 0\.01, but every alignment of the model has one expert"):
        check_balance(RouterLoss(balance_weight=0.01), single)
    check_balance(RouterLoss(balance_weight=0.01), MAP)
    check_balance(RouterLoss(), single)
