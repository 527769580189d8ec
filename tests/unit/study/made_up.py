"""Results of a study's suite with invented numbers, and what a study is made of without running it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from h3scale.evaluation.measures import summarise_items

ALIGNMENTS = ["helpful", "harmless", "honest"]


def result(levels: Sequence[float], num_items: int = 40, seed: int = 0, noise: float = 0.3) -> dict[str, Any]:
    """As `suite.result_of` gives it: items whose NLL per token is an alignment's level plus noise, two to a prompt."""
    rng = np.random.default_rng(seed)
    items = []
    for alignment, level in zip(ALIGNMENTS, levels, strict=True):
        lengths = np.random.default_rng(len(alignment)).integers(3, 30, num_items)  # the same for every model
        for number, tokens in enumerate(lengths.tolist()):
            nll = float(tokens * (level + noise * rng.standard_normal()))
            items.append(
                {"id": f"{alignment}-{number}", "group": number // 2, "alignment": alignment, "nll": nll, "tokens": tokens}
            )
    pairs = [{"id": str(i), "group": i, "alignment": "honest", "accuracy": float(rng.random() < 0.5)} for i in range(20)]
    of_none = [{"id": str(i), "group": i, "alignment": None, "accuracy": float(rng.random() < 0.5)} for i in range(10)]
    tasks = {"known": items, "pairs": pairs, "others": of_none}  # a task need not be of an alignment
    scores = [score for task, asked in tasks.items() for score in summarise_items(task, asked)]
    return {"suite": "made up", "seed": 0, "scores": scores, "items": tasks, "notes": []}


def exact(levels: Sequence[float]) -> dict[str, Any]:
    """Without noise: each alignment's NLL is its level."""
    return result(levels, noise=0.0)
