"""results.json of a study: all models side by side, over its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from h3scale.config.study import StudyRecipe
from h3scale.evaluation.measures import HIGHER_IS_BETTER, Difference, differences
from h3scale.study.answer_scores import AnswerScores, answer_scores
from h3scale.study.conflict import conflicts
from h3scale.study.evidence import Evidence
from h3scale.study.scores import Number, Resampler, gains, over_seeds, verdict

Results = dict[int, dict[str, dict[str, Any]]]  # by seed and model


def assemble(seeds: Sequence[Evidence]) -> dict[str, Any]:
    """results.json of one seed or several; docs/study.md says what is in it."""
    first = seeds[0]
    recipe = first.recipe.model_copy(update={"seeds": [evidence.seed for evidence in seeds]})
    found: Results = {evidence.seed: evidence.results() for evidence in seeds}
    resampler = Resampler(found[first.seed]["base"], recipe.alignments)
    nll = {name: np.stack([resampler.nll(each[name]) for each in found.values()]) for name in first.models}
    answers = {name: answer_scores([each[name] for each in found.values()]) for name in first.models}
    compared = _Compared(recipe, resampler, nll, answers)
    models = {}
    for name, model in first.models.items():
        costs = [evidence.models[name].cost for evidence in seeds]
        models[name] = {
            "group": model.group,
            "parameters": model.cost.parameters,
            "tokens": model.cost.tokens,
            "train_s": _mean([cost.train_s for cost in costs]),
            "make_s": _mean([cost.make_s for cost in costs]),
            "same_tokens": model.cost.tokens == first.models[recipe.main].cost.tokens,
            **compared.of(name),
            "scores": answers[name].scores,
        }
    return {
        "version": first.version,
        "suite": first.suite,
        "recipe": recipe.model_dump(),
        "alignments": recipe.alignments,
        "seeds": recipe.seeds,
        "main": recipe.main,
        "models": models,
        "comparisons": [{"one": one, "other": other, **compared.pair(one, other)} for one, other in first.compare],
        "code": sorted({code for evidence in seeds for code in evidence.code}),
        "conflict": conflicts(recipe, resampler, nll, [evidence.pairs for evidence in seeds if evidence.pairs]),
        "notes": list(dict.fromkeys(note for each in found.values() for result in each.values() for note in result["notes"])),
    }


class _Compared:
    """The models' numbers. Over several seeds the NLL is averaged first, so that a gain is not one of a lucky base."""

    def __init__(
        self, recipe: StudyRecipe, resampler: Resampler, nll: Mapping[str, np.ndarray], answers: Mapping[str, AnswerScores]
    ):
        self.recipe, self.resampler, self.nll, self.answers = recipe, resampler, nll, answers
        self.mean = {name: each.mean(axis=0) for name, each in nll.items()}

    def of(self, name: str) -> dict[str, Any]:
        alignments = self.recipe.alignments
        gains_AR = self._gains(self.mean, name)
        by_seed = {}
        for at, seed in enumerate(self.recipe.seeds):
            one = self._gains({other: each[at] for other, each in self.nll.items()}, name)[:, 0]
            values = self.nll[name][at][:, 0]
            by_seed[str(seed)] = {
                "nll": dict(zip(alignments, values.tolist(), strict=True)),
                "gain": {a: _finite(gain) for a, gain in zip(alignments, one.tolist(), strict=True)},
                "balance": _finite(float(one.min())),
            }
        return {
            "nll": self._numbers(self.mean[name]),
            "mean_nll": asdict(self.resampler.number(self.mean[name].mean(axis=0))),
            "gain": self._numbers(gains_AR),
            "mean_gain": asdict(self.resampler.number(gains_AR.mean(axis=0))),
            "balance": asdict(self.resampler.least(gains_AR)),
            "by_seed": by_seed,
            **({} if name == self.recipe.main else {"paired": self.pair(self.recipe.main, name)}),
        }

    def pair(self, one: str, other: str) -> dict[str, Any]:
        """One model less another on the same resamples and, over the seeds, from the same base: mean NLL, balance, other scores."""
        apart = (self.nll[one] - self.nll[other]).mean(axis=1)  # seeds, R
        items, seeds = self.resampler.number(apart.mean(axis=0)), over_seeds(apart[:, 0].tolist())
        balance = self.resampler.least_less(self._gains(self.mean, one), self._gains(self.mean, other))
        balances = [self._balance(one, at) - self._balance(other, at) for at in range(len(self.recipe.seeds))]
        balance_seeds = over_seeds(balances) if np.isfinite(balances).all() else Number(None)
        return {
            "mean_nll": asdict(items),
            "over_seeds": asdict(seeds),
            "by_seed": dict(zip(map(str, self.recipe.seeds), apart[:, 0].tolist(), strict=True)),
            "verdict": verdict(items, self._if_several(seeds)),
            "balance": asdict(balance),
            "balance_over_seeds": asdict(balance_seeds),
            "balance_verdict": verdict(balance, self._if_several(balance_seeds), higher_is_better=True),
            "scores": [
                self._answers_apart(one, other, found) for found in differences(self.answers[one].items, self.answers[other].items)
            ],
        }

    def _answers_apart(self, one: str, other: str, found: Difference) -> dict[str, Any]:
        """A score of answers of one model less the other's: of the items, over the seeds, and what both let one say."""
        key = (found.task, found.metric, found.alignment)
        apart = [a - b for a, b in zip(self.answers[one].by_seed[key], self.answers[other].by_seed[key], strict=True)]
        seeds = over_seeds(apart)
        told = verdict(
            Number(found.mean, found.low, found.high), self._if_several(seeds), higher_is_better=HIGHER_IS_BETTER[found.metric]
        )
        return {
            **{key: value for key, value in asdict(found).items() if key != "better"},
            "over_seeds": asdict(seeds),
            "by_seed": dict(zip(map(str, self.recipe.seeds), apart, strict=True)),
            "verdict": told,
        }

    def _if_several(self, seeds: Number) -> Number | None:
        return seeds if len(self.recipe.seeds) > 1 else None

    def _balance(self, name: str, at: int) -> float:
        """Of one seed."""
        return float(self._gains({other: each[at] for other, each in self.nll.items()}, name)[:, 0].min())

    def _gains(self, nll: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return gains(nll[name], nll["base"], [nll[alignment] for alignment in self.recipe.alignments])

    def _numbers(self, values_AR: np.ndarray) -> dict[str, Any]:
        return {a: asdict(self.resampler.number(values_R)) for a, values_R in zip(self.recipe.alignments, values_AR, strict=True)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
