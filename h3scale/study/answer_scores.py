"""A suite's scores of answers (TruthfulQA, preferred answers) of one model of a study, over its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from h3scale.evaluation.measures import HIGHER_IS_BETTER, summarise_items
from h3scale.study.scores import over_seeds


@dataclass(frozen=True)
class AnswerScores:
    """The suite's scores that are no NLL, of one model with several seeds. `items` by task: each item's number is its mean over the
    seeds. `by_seed`: each seed's score, by (task, metric, alignment). `scores`: `low` and `high` are of the items, `over_seeds`
    has Student's interval."""

    items: dict[str, list[dict[str, Any]]]
    by_seed: dict[tuple[str, str, str | None], list[float]]
    scores: list[dict[str, Any]]


def answer_scores(results: Sequence[Mapping[str, Any]]) -> AnswerScores:
    """Of one model's results, one a seed."""
    tasks = [task for task, items in results[0]["items"].items() if not any("nll" in item for item in items)]
    items = {task: [_averaged(each) for each in zip(*(r["items"][task] for r in results), strict=True)] for task in tasks}
    by_seed: dict[tuple[str, str, str | None], list[float]] = {}
    for result in results:
        for score in result["scores"]:
            if score["task"] in tasks:
                by_seed.setdefault((score["task"], score["metric"], score["alignment"]), []).append(score["mean"])
    scores = []
    for score in [score for task in tasks for score in summarise_items(task, items[task])]:
        means = by_seed[score["task"], score["metric"], score["alignment"]]
        seeds = {"by_seed": means, "over_seeds": asdict(over_seeds(means))}
        scores.append({**score, **seeds, "higher_is_better": HIGHER_IS_BETTER[score["metric"]]})
    return AnswerScores(items, by_seed, scores)


def _averaged(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One item, each number its mean over the seeds."""
    return {**items[0], **{key: float(np.mean([item[key] for item in items])) for key in HIGHER_IS_BETTER if key in items[0]}}
