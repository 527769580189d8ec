"""The lowest point of known functions, within the budget."""

import math

import pytest

from h3scale.study.minimise import Axis, Point, Trial, lowest, minimise

X = Axis("x", 0.0, 8.0, starts=(0.0, 1.0, 0.5), step=0.5)
Y = Axis("y", 0.02, 1.0, starts=(0.2, 0.5), step=0.7, is_log=True)


@pytest.mark.parametrize("best", [0.0, 0.13, 0.5, 0.77, 1.0, 2.6, 8.0])
def test_the_lowest_point_of_a_parabola_is_found_wherever_it_is(best: float) -> None:
    trials = minimise([X], {"x": 1.0}, 24, lambda point: (point["x"] - best) ** 2 + 3)
    assert lowest(trials).point["x"] == pytest.approx(best, abs=0.02)


def test_three_points_of_a_parabola_give_its_lowest_in_the_fourth() -> None:
    assert [t.point["x"] for t in minimise([X], {"x": 1.0}, 4, lambda point: (point["x"] - 0.7) ** 2)] == [0, 1, 0.5, 0.7]


@pytest.mark.parametrize("budget", [3, 5, 12, 40])
@pytest.mark.parametrize("axes", [[X], [X, Y]])
def test_no_more_than_the_budget_is_evaluated_and_no_point_twice(axes: list[Axis], budget: int) -> None:
    trials = minimise(axes, {axis.key: 1.0 for axis in axes}, budget, lambda point: sum(math.sin(3 * v) for v in point.values()))
    places = [tuple(trial.point.items()) for trial in trials]
    assert len(places) == len(set(places)) <= budget


def test_two_axes_are_searched_in_turn() -> None:
    def valley(point: Point) -> float:
        return (
            (point["x"] - 0.6) ** 2
            + (math.log(point["y"]) - math.log(0.35)) ** 2
            + 0.3 * (point["x"] - 0.6) * math.log(point["y"] / 0.35)
        )

    found = lowest(minimise([X, Y], {"x": 1.0, "y": 0.2}, 24, valley)).point
    assert found == pytest.approx({"x": 0.6, "y": 0.35}, abs=0.05)


def test_what_is_not_a_number_is_never_the_best() -> None:
    trials = minimise([X], {"x": 1.0}, 10, lambda point: math.nan if point["x"] > 0.8 else (point["x"] - 0.3) ** 2)
    assert lowest(trials).point["x"] == pytest.approx(0.3, abs=0.05)
    assert lowest([Trial({"x": 1.0}, math.nan), Trial({"x": 2.0}, 5.0)]).point == {"x": 2.0}
