"""What aligning one does to the others: in NLL, and in the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from h3scale.config.study import StudyRecipe
from h3scale.study.scores import Resampler

FIGURES = ("cosine", "sign_conflict", "overlap", "overlap_by_chance")


def conflicts(
    recipe: StudyRecipe, resampler: Resampler, nll: Mapping[str, np.ndarray], pairs: Sequence[list[dict[str, Any]]]
) -> dict[str, Any]:
    """`nll`: of each aligned model on each alignment less the base's, above 0 where it is worse. `pairs`: figures of
    merge --explain for the whole models, as they are in each seed; their means."""
    base = nll["base"].mean(axis=0)
    table = {
        aligned: {
            alignment: asdict(resampler.number(change_R))
            for alignment, change_R in zip(recipe.alignments, nll[aligned].mean(axis=0) - base, strict=True)
        }
        for aligned in recipe.alignments
    }
    return {"nll": table, "pairs": _means(pairs)}


def _means(seeds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for same in zip(*seeds, strict=True):
        means = {key: _mean([pair[key] for pair in same]) for key in FIGURES}
        found.append({"models": same[0]["models"], **means})
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
