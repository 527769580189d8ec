"""What one seed of a study has shown: `seed-N.json.gz` holds all that results are made of, and no model.

Seeds can so be run on several machines, or one after another, and put together later. Items stand by columns: what all models have
alike (prompts' numbers, tokens) once, numbers of a model with it, to six decimals.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from h3scale.config.strict import Strict
from h3scale.config.study import StudyRecipe
from h3scale.errors import ConfigError, DataError, MissingInputError

Columns = dict[str, list[Any]]


class Cost(Strict):
    """What it takes to have a model: parameters (total, active), tokens trained on after the base, seconds where they are known."""

    parameters: dict[str, int]
    tokens: int
    train_s: float | None
    make_s: float | None


class Shown(Strict):
    """One model of one seed. `items`: by task, the columns that are its own; `scores` as evaluation.suite.result_of gives them."""

    group: str
    cost: Cost
    scores: list[dict[str, Any]]
    items: dict[str, Columns]
    notes: list[str]


class Evidence(Strict):
    """One seed. `made_from`: sha256 of recipes and records; `items`: by task, the columns that all models have alike; `pairs`: of
    merge --explain, for the whole models, where there are any."""

    format: Literal[1] = 1
    version: str
    code: list[str]
    recipe: StudyRecipe
    made_from: dict[str, str]
    seed: int = Field(ge=0)
    suite: str
    compare: list[list[str]]
    items: dict[str, Columns]
    models: dict[str, Shown] = Field(min_length=1)
    pairs: list[dict[str, Any]] | None

    @model_validator(mode="after")
    def _columns_are_as_long(self) -> "Evidence":
        for name, model in self.models.items():
            if model.items.keys() != self.items.keys():
                raise ValueError(f"{name} has other tasks than the seed")
            for task, columns in model.items.items():
                if len({len(values) for values in (*columns.values(), *self.items[task].values())}) > 1:
                    raise ValueError(f"{name}: columns of {task} are not of one length")
        return self

    def results(self) -> dict[str, dict[str, Any]]:
        """The suite's result of each model (see evaluation.suite.result_of)."""
        return {
            name: {
                "suite": self.suite,
                "scores": model.scores,
                "items": {task: _rows(shared | model.items[task]) for task, shared in self.items.items()},
                "notes": model.notes,
            }
            for name, model in self.models.items()
        }

    def identity(self) -> dict[str, Any]:
        """What the seeds of one study have in common, by what a finding calls it. Places are no part of it."""
        recipe = {key: value for key, value in self.recipe.model_dump().items() if key not in ("seeds", "recipes", "suite")}
        models = {name: (model.group, model.cost.parameters, model.cost.tokens) for name, model in self.models.items()}
        return {**recipe, **self.made_from, "suite": self.suite, "version": self.version, "compare": self.compare, "models": models}

    def hash(self) -> str:
        """Of the identity: which study it is."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def read_seed(path: Path) -> Evidence:
    """One seed's file. MissingInputError (66), DataError (65)."""
    try:
        return Evidence.model_validate(json.loads(gzip.decompress(path.read_bytes())))
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not what h3scale study leaves of a seed ({where}: {first['msg']})") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: not what h3scale study leaves of a seed ({error})") from None


def read_seeds(paths: Sequence[Path]) -> list[Evidence]:
    """Several seeds of one study, in the order of their numbers. ConfigError (78) where they are not of one, with what differs."""
    found = [(path, read_seed(path)) for path in paths]
    ours = found[0][1].identity()
    for path, evidence in found[1:]:
        theirs = evidence.identity()
        unlike = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if unlike:
            raise ConfigError(
                f"{path}: not as in {found[0][0]}: {', '.join(unlike)} (works: seeds of the same recipes and records)"
            )
    seeds = sorted(evidence.seed for _, evidence in found)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"two files of one seed: {', '.join(map(str, seeds))} (works: one of each)")
    return sorted((evidence for _, evidence in found), key=lambda evidence: evidence.seed)


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
