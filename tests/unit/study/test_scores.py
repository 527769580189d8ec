"""Gain, balance and differences: by hand, and their intervals by simulation."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from h3scale.errors import DataError
from h3scale.study.scores import Number, Resampler, gains, over_seeds, verdict

from .made_up import ALIGNMENTS, exact, result


def gains_of(model: list[float], base: list[float], *singles: list[float]) -> np.ndarray:
    resampler = Resampler(exact(base), ALIGNMENTS, resamples=20)
    nll = [resampler.nll(exact(levels)) for levels in (model, base, *singles)]
    return gains(nll[0], nll[1], nll[2:])


def balance_of(gains_AR: np.ndarray) -> Number:
    return Resampler(exact([3.0, 3.0, 3.0]), ALIGNMENTS, resamples=20).least(gains_AR)


def test_a_gain_is_the_share_of_what_the_best_aligned_model_gains_and_the_balance_is_the_least() -> None:
    found = gains_of([2.5, 2.0, 3.5], [3.0, 3.0, 3.0], [2.0, 3.1, 3.1], [2.5, 1.0, 3.2], [3.3, 3.3, 2.0])
    assert found[:, 0] == pytest.approx([0.5, 0.5, -0.5])  # of 1.0 from the first, 2.0 from the second, 1.0 from the third
    assert balance_of(found).mean == pytest.approx(-0.5)


def test_where_no_aligned_model_is_better_than_the_base_there_is_no_gain_and_no_balance() -> None:
    found = gains_of([2.5, 2.0, 3.5], [3.0, 3.0, 3.0], [2.0, 3.1, 2.9])
    resampler = Resampler(exact([3.0, 3.0, 3.0]), ALIGNMENTS, resamples=20)
    assert np.isnan(found[1]).all()
    assert resampler.number(found[1]) == Number(None)
    assert resampler.least(found) == Number(None)


def test_resamples_without_a_number_count_as_the_lowest_and_as_the_highest() -> None:
    resampler = Resampler(exact([1.0, 1.0, 1.0]), ALIGNMENTS, resamples=100)
    values = np.linspace(0, 1, 101)
    whole = resampler.number(values)
    values[50] = np.nan
    one_missing = resampler.number(values)
    assert None not in (whole.low, whole.high, one_missing.low, one_missing.high)
    assert one_missing.low < whole.low < whole.high < one_missing.high  # type: ignore[operator]
    values[5:10] = np.nan
    assert resampler.number(values) == Number(0.0), "an interval that would have no end"


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_a_balance_is_the_same_in_every_order_of_the_alignments_and_needs_all_of_them(order: tuple[int, ...]) -> None:
    resampler, rng = Resampler(exact([1.0, 1.0, 1.0]), ALIGNMENTS, resamples=400), np.random.default_rng(0)
    gains_AR = np.array([[0.2], [0.5], [0.5]]) + 0.05 * rng.standard_normal((3, 401))
    gains_AR[:, 0] = 0.2, 0.5, 0.5
    told, other_AR = resampler.least(gains_AR), np.full_like(gains_AR, 0.1)
    ordered_AR = gains_AR[list(order)]
    assert told.low is not None
    assert resampler.least(ordered_AR) == told
    assert resampler.least_less(ordered_AR, other_AR) == resampler.least_less(gains_AR, other_AR)
    gains_AR[0, 1:120] = np.nan  # the base is as good as the best aligned model in so many resamples
    assert resampler.least(gains_AR[list(order)]) == Number(0.2)
    assert resampler.least_less(gains_AR[list(order)], other_AR) == Number(pytest.approx(0.1))


def test_nll_is_the_sum_over_the_tokens_and_not_the_mean_over_the_items() -> None:
    one = result([1.0, 2.0, 3.0])
    items = [item for item in one["items"]["known"] if item["alignment"] == "honest"]
    expected = sum(item["nll"] for item in items) / sum(item["tokens"] for item in items)
    assert Resampler(one, ALIGNMENTS).nll(one)[2, 0] == pytest.approx(expected)


def test_models_that_were_asked_something_else_are_not_compared() -> None:
    resampler = Resampler(result([1.0, 2.0, 3.0]), ALIGNMENTS)
    with pytest.raises(DataError, match="not evaluated on the same items"):
        resampler.nll(result([1.0, 2.0, 3.0], num_items=38))
    with pytest.raises(DataError, match="no task of kind nll has records of 'kind'"):
        Resampler(result([1.0, 2.0, 3.0]), [*ALIGNMENTS, "kind"])


def test_what_is_hard_for_both_cancels() -> None:
    """Two models with the same noise on every item differ by a constant: the interval of the difference is a point."""
    resampler = Resampler(result([2.0, 2.0, 2.0], seed=5), ALIGNMENTS)
    one, other = (resampler.nll(result(levels, seed=5)) for levels in ([2.0, 2.0, 2.0], [2.1, 2.1, 2.1]))
    alone, paired = resampler.number(one.mean(axis=0)), resampler.number((other - one).mean(axis=0))
    assert alone.high is not None
    assert alone.low is not None
    assert alone.high - alone.low > 0.05
    assert (paired.low, paired.mean, paired.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("studies", "low", "high"),
    [
        pytest.param(200, 0.90, 0.995, id="a few"),  # three standard errors around 0.95
        pytest.param(3000, 0.93, 0.97, id="full", marks=pytest.mark.slow),
    ],
)
def test_an_interval_of_95_percent_holds_the_truth_in_about_95_of_100_studies(studies: int, low: float, high: float) -> None:
    truth, held = -0.05, 0
    for seed in range(studies):
        resampler = Resampler(result([2.0, 2.0, 2.0], num_items=120, seed=2 * seed), ALIGNMENTS, resamples=400)
        one = resampler.nll(result([2.0, 2.0, 2.0], num_items=120, seed=2 * seed))
        other = resampler.nll(result([2.05, 2.05, 2.05], num_items=120, seed=2 * seed + 1))
        found = resampler.number((one - other).mean(axis=0))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert low <= held / studies <= high


@pytest.mark.parametrize("true_gains", [(0.5, 0.5, 0.5), (0.2, 0.6, 0.9)], ids=["balanced", "lopsided"])
def test_intervals_of_balance_and_of_its_differences_hold_the_truth(true_gains: tuple[float, ...]) -> None:
    """Where all gains are alike the least of noisy ones lies too low: percentiles of it hold the truth in 3 of 4 studies."""
    studies, held, held_difference, others = 150, 0, 0, (0.4, 0.4, 0.4)
    room = np.array([0.1, 0.1, 0.1])
    base = [2.0, 2.0, 2.0]

    def made(shares: tuple[float, ...] | list[float], seed: int) -> dict[str, Any]:
        return result([level - share * each for level, share, each in zip(base, shares, room, strict=True)], 120, seed, noise=0.05)

    for study in range(studies):
        seeds = iter(range(6 * study, 6 * study + 6))
        first = made([0, 0, 0], next(seeds))
        resampler = Resampler(first, ALIGNMENTS, resamples=400)
        base_AR = resampler.nll(first)
        singles = [resampler.nll(made([float(a == b) for b in range(3)], next(seeds))) for a in range(3)]
        one, other = (gains(resampler.nll(made(shares, next(seeds))), base_AR, singles) for shares in (true_gains, others))
        found, difference = resampler.least(one), resampler.least_less(one, other)
        assert None not in (found.low, found.high, difference.low, difference.high)
        held += found.low <= min(true_gains) <= found.high  # type: ignore[operator]
        held_difference += difference.low <= min(true_gains) - min(others) <= difference.high  # type: ignore[operator]
    assert held / studies >= 0.92
    assert held_difference / studies >= 0.92


def test_seeds_have_students_interval_and_one_seed_has_none() -> None:
    values = [0.1, 0.4, 0.25]
    found = over_seeds(values)
    half = 4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t of two degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))
    assert over_seeds([0.3]) == Number(0.3)


def test_nothing_is_better_that_only_one_of_the_two_intervals_says() -> None:
    sure, unsure, other_way = Number(-1.0, -1.5, -0.5), Number(-1.0, -3.0, 1.0), Number(1.0, 0.5, 1.5)
    assert verdict(sure, sure) == verdict(sure, None) == "better"
    assert verdict(sure, unsure) == verdict(unsure, sure) == verdict(sure, other_way) == "undecided"
    assert verdict(sure, Number(-1.0)) == verdict(Number(-1.0), sure) == verdict(sure, Number(None)) == "undecided"
    assert verdict(other_way, None) == verdict(sure, None, higher_is_better=True) == "worse"
