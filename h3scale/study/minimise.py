"""The lowest point of a function that is dear to evaluate, along one axis after the other, within a number of evaluations."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Point = dict[str, float]

RESOLUTION = 0.02  # of an axis' step: neighbours that are nearer are not told apart
_TURNS = 4
_DIGITS = 4  # that a place is rounded to: people type it again


@dataclass(frozen=True)
class Axis:
    """A number that is looked for between two ends. `starts` come first; then steps of `step` out of the lowest, or between.

    `is_log`: steps multiply (by e^step).
    """

    key: str
    low: float
    high: float
    starts: tuple[float, ...]
    step: float
    is_log: bool = False

    def warp(self, place: float) -> float:
        return math.log(place) if self.is_log else place

    def unwarp(self, place: float) -> float:
        found = float(f"{math.exp(place) if self.is_log else place:.{_DIGITS}g}")
        return min(max(found, self.low), self.high)


@dataclass(frozen=True)
class Trial:
    """One evaluation."""

    point: Point
    value: float


def minimise(axes: Sequence[Axis], start: Point, budget: int, evaluate: Callable[[Point], float]) -> list[Trial]:
    """The trials in their order, at most `budget`, no point twice; stops earlier when no axis has a place left to try.

    Half of the budget is for the first axis, a quarter for the next, the rest for what they find from there. A value that is
    not a number counts as the worst.
    """
    trials: list[Trial] = []
    best = start
    turns = _TURNS if len(axes) > 1 else 1
    for turn in range(turns):
        axis = axes[turn % len(axes)]
        if turn >= len(axes):
            axis = replace(axis, starts=(), step=axis.step / 2)
        limit = -(-budget * min(turns, turn + 2) // turns)
        while len(trials) < limit and (place := _proposed(axis, trials, best)) is not None:
            point = best | {axis.key: place}
            trials.append(Trial(point, evaluate(point)))
            best = lowest(trials).point
    return trials


def lowest(trials: Sequence[Trial]) -> Trial:
    """The best of all; of equal ones the first."""
    return min(trials, key=lambda trial: math.inf if math.isnan(trial.value) else trial.value)


def _proposed(axis: Axis, trials: Sequence[Trial], best: Point) -> float | None:
    """Where to look next along the line through the best point."""
    line = {trial.point[axis.key]: trial.value for trial in trials if trial.point == best | {axis.key: trial.point[axis.key]}}
    untried = [place for place in axis.starts if place not in line]
    return untried[0] if untried else next_place(axis, line)


def next_place(axis: Axis, line: Mapping[float, float]) -> float | None:
    """Beyond the lowest where it is the outermost, else where a parabola through it and its neighbours is lowest; None: done."""
    places = sorted(line)
    at = min(range(len(places)), key=lambda i: math.inf if math.isnan(line[places[i]]) else line[places[i]])
    here = axis.warp(places[at])
    for is_outermost, end, sign in ((at == len(places) - 1, axis.high, 1), (at == 0, axis.low, -1)):
        if is_outermost and places[at] != end:
            return axis.unwarp(_within(axis, here + sign * axis.step))
    for place in _between(axis, [axis.warp(p) for p in places], [line[p] for p in places], at):
        found = axis.unwarp(place)
        if all(abs(axis.warp(found) - axis.warp(p)) > RESOLUTION * axis.step for p in places):
            return found
    return None


def _within(axis: Axis, place: float) -> float:
    return min(max(place, axis.warp(axis.low)), axis.warp(axis.high))


def _between(axis: Axis, places: list[float], values: list[float], at: int) -> Iterator[float]:
    """The parabola's lowest place, then the middles of the gaps beside the lowest trial, the wider first."""
    if 0 < at < len(places) - 1:
        left, right = places[at] - places[at - 1], places[at + 1] - places[at]
        up, down = (values[at - 1] - values[at]) / left, (values[at + 1] - values[at]) / right
        if math.isfinite(up) and math.isfinite(down) and up + down > 0:
            yield places[at] + (up * right - down * left) / (2 * (up + down))
    gaps = [(places[i + 1] - places[i], places[i]) for i in (at - 1, at) if 0 <= i < len(places) - 1]
    for gap, low in sorted(gaps, reverse=True):
        yield low + gap / 2
