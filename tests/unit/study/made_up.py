"""Results of a study's suite with invented numbers, and what a study is made of without running it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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
    score = {
        "task": "pairs",
        "metric": "accuracy",
        "alignment": "honest",
        "mean": 0.5,
        "low": 0.4,
        "high": 0.6,
        "items": 20,
        "groups": 20,
    }
    return {"suite": "made up", "seed": 0, "scores": [score], "items": {"known": items}, "notes": []}


def exact(levels: Sequence[float]) -> dict[str, Any]:
    """Without noise: each alignment's NLL is its level."""
    return result(levels, noise=0.0)
