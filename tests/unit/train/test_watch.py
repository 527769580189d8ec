"""Warnings from a run's own figures: once an episode, and none without reason."""

import logging
import random

import pytest

from h3scale.config.recipe import Guards
from h3scale.train.watch import WARM_UP, Watch

EXPERTS = {"helpful": "helpful", "harmless": "harmless", "honest": "honest", "general": None}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    return caplog


def flags(watch: Watch, losses: list[float], first: int = 1) -> list[int]:
    """The steps at which a loss spike is said."""
    return [step for step, lm in enumerate(losses, start=first) if watch.take({"step": step, "lm": lm})]


def noisy(steps: int, level: float = 2.0, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.05) for _ in range(steps)]


def test_a_jump_of_the_loss_is_said_once_an_episode(warnings: pytest.LogCaptureFixture) -> None:
    calm = noisy(60)
    assert flags(Watch(Guards(), {}), [*calm, 3.0, 3.1, 2.9, *noisy(30, seed=1), 3.0, *noisy(5)]) == [61, 94]
    assert len(warnings.messages) == 2
    assert warnings.messages[0].startswith("step 61: lm jumps to 3; the 60 steps before had 2")


def test_a_loss_that_stays_higher_is_said_once_and_the_next_jump_again() -> None:
    for shift in (0.5, 5.0):  # as when an alignment has no records left
        losses = [*noisy(150), *noisy(200, level=2.0 + shift, seed=1), 50.0]
        assert flags(Watch(Guards(), {}), losses) == [151, len(losses)]


def test_noise_a_falling_loss_and_the_first_steps_are_no_jump() -> None:
    assert flags(Watch(Guards(), {}), noisy(3000)) == []
    assert flags(Watch(Guards(), {}), [9.0 - step / 100 for step in range(500)]) == []
    assert flags(Watch(Guards(), {}), [1.0] * (WARM_UP - 1) + [5.0]) == []
    assert flags(Watch(Guards(), {}), [1.0] * WARM_UP + [5.0]) == [WARM_UP + 1]


def test_more_sigmas_say_less() -> None:
    losses = [*noisy(60), 2.5]
    assert flags(Watch(Guards(spike_sigmas=6), {}), losses) == [61]
    assert flags(Watch(Guards(spike_sigmas=30), {}), losses) == []


def test_a_skipped_step_has_no_loss_and_ends_no_episode() -> None:
    watch = Watch(Guards(), {})
    assert flags(watch, noisy(60)) == []
    assert watch.take({"step": 61, "lm": 3.0}) == {"warning/loss_spike": 1}
    assert watch.take({"step": 62, "skipped": 1}) == {}
    assert watch.take({"step": 63, "lm": 3.0}) == {}


def load(step: int, idle: str | None, share: float) -> dict[str, float]:
    """Tokens of all experts, one of them with `share` of an even share."""
    tokens = dict.fromkeys(EXPERTS, 1000.0)
    if idle:
        rest = sum(tokens.values()) - 1000
        tokens[idle] = share * rest / (len(EXPERTS) - share)
    return {"step": step} | {f"tokens_per_expert/{name}": taken for name, taken in tokens.items()}


def test_an_expert_without_tokens_is_said_once_an_episode(warnings: pytest.LogCaptureFixture) -> None:
    watch = Watch(Guards(collapse_share=0.1, collapse_steps=3), EXPERTS)
    idle = ["harmless"] * 5 + [None] + ["harmless"] * 2 + [None] + ["harmless"] * 4
    said = [step for step, name in enumerate(idle, start=1) if watch.take(load(step, name, 0.09))]
    assert said == [3, 12]
    assert "expert 'harmless' has had less than 0.1 of an even share of the tokens for 3 steps (now 0.09; " in warnings.messages[0]
    assert "router.balance_weight" in warnings.messages[0]


def test_an_uneven_load_is_no_collapse_and_a_general_expert_may_be_unused(warnings: pytest.LogCaptureFixture) -> None:
    guards = Guards(collapse_share=0.1, collapse_steps=3)
    watch = Watch(guards, EXPERTS)
    assert [watch.take(load(step, "harmless", 0.11)) for step in range(10)] == [{}] * 10
    watch = Watch(guards, EXPERTS)
    assert [watch.take(load(step, "general", 0.0)) for step in range(3)][-1] == {"warning/expert_collapse/general": 1}
    assert warnings.messages[-1].endswith("a general expert may be unused: no loss asks for it)")
