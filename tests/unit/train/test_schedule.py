"""The learning rate: up, then down to its final share, never above its peak."""

import pytest

from h3scale.config.recipe import Optimizer
from h3scale.train.schedule import learning_rate_share


def shares(schedule: str, steps: int = 100) -> list[float]:
    recipe = Optimizer(learning_rate=1.0, schedule=schedule, warmup_share=0.1, final_share=0.2)  # type: ignore[arg-type]
    return [learning_rate_share(step, steps, recipe) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_it_warms_up_to_the_peak_and_never_goes_above(schedule: str) -> None:
    found = shares(schedule)
    assert 0 < found[0] < found[5] < found[10] == pytest.approx(1.0)
    assert max(found) <= 1.0


def test_it_falls_to_the_final_share() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        found = shares(schedule, 1000)
        assert found[100:] == sorted(found[100:], reverse=True)
        assert found[-1] == pytest.approx(0.2, abs=5e-3)
    assert set(shares("constant")[10:]) == {1.0}


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert shares("cosine")[55] == pytest.approx(0.6)


def test_wsd_keeps_its_peak_and_then_falls_in_a_line() -> None:
    found = shares("wsd", 1000)
    assert set(found[100:801]) == {1.0}
    assert found[900] == pytest.approx(0.6)
    assert shares("wsd", 2000)[200:800] == found[200:800], "before the decay the length of the run makes no difference"
