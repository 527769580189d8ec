"""What aligning one does to the others: in NLL, and in the weights."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from h3scale.checkpoint.shards import read_json
from h3scale.config.study import StudyRecipe
from h3scale.study.scores import Resampler

FIGURES = ("cosine", "sign_conflict", "overlap", "overlap_by_chance")


def conflicts(recipe: StudyRecipe, resampler: Resampler, nll: Mapping[str, np.ndarray], out: Path) -> dict[str, Any]:
    """`nll`: of each aligned model on each alignment less the base's, above 0 where it is worse. `pairs`: figures of
    merge --explain for the whole models, mean over the seeds."""
    base = nll["base"].mean(axis=0)
    table = {
        aligned: {
            alignment: asdict(resampler.number(change_R))
            for alignment, change_R in zip(recipe.alignments, nll[aligned].mean(axis=0) - base, strict=True)
        }
        for aligned in recipe.alignments
    }
    explained = [read_json(out / f"seed-{seed}/explain/explain.json") for seed in recipe.seeds]
    return {"nll": table, "pairs": _pairs([each["whole"]["pairs"] for each in explained if each["whole"]])}


def _pairs(seeds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for same in zip(*seeds, strict=True):
        means = {key: _mean([pair[key] for pair in same]) for key in FIGURES}
        found.append({"models": same[0]["models"], **means})
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
