"""What a study says of its models in numbers: NLL, gain, balance, differences, with intervals.

All models see the same resamples of the same items, so every number of two models is paired. Items with the same prompt are drawn
together.

Shape suffixes: A alignments, G groups of items with the same prompt, R one column as measured and then the resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from h3scale.errors import DataError
from h3scale.evaluation.score import RESAMPLES, SEED, by_group, tail


@dataclass(frozen=True)
class Number:
    """A value and its 95% interval; none where there is none."""

    mean: float | None
    low: float | None = None
    high: float | None = None


class Resampler:
    """The items of a study's suite that have an NLL, drawn again and again, the same for every model."""

    def __init__(self, first: Mapping[str, Any], alignments: Sequence[str], resamples: int = RESAMPLES):
        self.asked = _asked(first)
        self.alignments = list(alignments)
        self.counts: dict[str, np.ndarray] = {}
        self.tokens: dict[str, np.ndarray] = {}
        for number, alignment in enumerate(alignments):
            sums, tokens = _by_group(first, alignment)
            if not len(sums):
                raise DataError(
                    f"suite {first['suite']}: no task of kind nll has records of '{alignment}' (a study compares by them)"
                )
            drawn = np.random.default_rng(SEED + number).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
            self.counts[alignment] = np.concatenate([np.ones((1, len(sums))), drawn])
            self.tokens[alignment] = self.counts[alignment] @ tokens
        self.num_groups = min(counts.shape[1] for counts in self.counts.values())

    def nll(self, result: Mapping[str, Any]) -> np.ndarray:
        """Nats per response token, (A, R). DataError (65) for a model that was asked something else."""
        if _asked(result) != self.asked:
            raise DataError("study: two models were not evaluated on the same items and tokens (works: an empty --out)")
        return np.stack([self.counts[name] @ _by_group(result, name)[0] / self.tokens[name] for name in self.alignments])

    def number(self, values_R: np.ndarray) -> Number:
        """What was measured, with percentiles of the resamples, further out where there are few items."""
        share = tail(self.num_groups)
        return _number(float(values_R[0]), _low(values_R, share), _high(values_R, share))

    def least(self, gains_AR: np.ndarray) -> Number:
        """The least gain of all alignments. Percentiles of the resamples' least ones would lie too low where gains are alike.

        Below: no gain is under its own lower bound, and so the least is not under the lowest of these. Above: it is over no upper
        bound, each of which may fail A times as rarely.
        """
        share = tail(self.num_groups)
        low = min(_low(gain_R, share) for gain_R in gains_AR)
        high = min(_high(gain_R, share / len(gains_AR)) for gain_R in gains_AR)
        return _number(float(gains_AR[:, 0].min()), low, high)

    def least_less(self, one_AR: np.ndarray, other_AR: np.ndarray) -> Number:
        """The least gain of one model less that of another: max over b, min over a of (one on a - other on b), in bounds.

        Each bound is of a difference on the same resamples and may fail A times as rarely.
        """
        share = tail(self.num_groups) / len(one_AR)
        low = max(min(_low(one_R - other_R, share) for one_R in one_AR) for other_R in other_AR)
        high = min(max(_high(one_R - other_R, share) for other_R in other_AR) for one_R in one_AR)
        return _number(float(one_AR[:, 0].min() - other_AR[:, 0].min()), low, high)


def gains(nll_AR: np.ndarray, base_AR: np.ndarray, singles: Sequence[np.ndarray]) -> np.ndarray:
    """(base - model) / (base - best single), (A, R): 0 is the base, 1 the best aligned model of that alignment.

    The best single model is chosen as measured. Where it is no better than the base there is no gain to compare with: nan.
    """
    found = []
    for at in range(len(nll_AR)):
        best = min((single[at] for single in singles), key=lambda nll_R: float(nll_R[0]))
        room_R = base_AR[at] - best
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(room_R > 0, (base_AR[at] - nll_AR[at]) / room_R, np.nan))
    return np.stack(found)


def over_seeds(values: Sequence[float]) -> Number:
    """The mean of one value a seed, with Student's 95% interval; from one seed nothing is known of others."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Number(mean)
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Number(mean, mean - half, mean + half)


def verdict(items: Number, seeds: Number | None, higher_is_better: bool = False) -> str:
    """Of one model less another: what both intervals let one say ('better', 'worse', 'undecided'); none of `seeds` for one seed.

    An interval that is not known leaves it undecided.
    """
    told = [items] if seeds is None else [items, seeds]
    words = ("worse", "better") if higher_is_better else ("better", "worse")
    if all(number.high is not None and number.high < 0 for number in told):
        return words[0]
    if all(number.low is not None and number.low > 0 for number in told):
        return words[1]
    return "undecided"


def _number(mean: float, low: float, high: float) -> Number:
    if not np.isfinite(mean):
        return Number(None)
    return Number(mean, low, high) if np.isfinite(low) and np.isfinite(high) else Number(mean)


def _low(values_R: np.ndarray, share: float) -> float:
    """The quantile of the resamples. One without a number may be anything, so it counts as the lowest; -inf if the end is there."""
    drawn = values_R[1:]
    with np.errstate(invalid="ignore"):
        found = float(np.quantile(np.where(np.isnan(drawn), -np.inf, drawn), share))
    return found if np.isfinite(found) else -np.inf


def _high(values_R: np.ndarray, share: float) -> float:
    """The same from above."""
    return -_low(-values_R, share)


def _items(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(task, item) for task, items in result["items"].items() for item in items if "nll" in item]


def _asked(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(task, item["id"], item["group"], item["alignment"], item["tokens"]) for task, item in _items(result)]


def _by_group(result: Mapping[str, Any], alignment: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums of NLL and of tokens, (G,) each."""
    mine = [(task, item) for task, item in _items(result) if item["alignment"] == alignment]
    return by_group(((task, item["group"]), item["nll"], item["tokens"]) for task, item in mine)
