"""What one seed of a study has shown: `seed-N.json.gz` holds all that results are made of, and no model.

Seeds can so be run on several machines, or one after another, and put together later. Items stand by columns: what all models have
alike (prompts' numbers, tokens) once, numbers of a model with it, to six decimals.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from h3scale import __version__
from h3scale.checkpoint.shards import ModelFolder, read_json, write_whole
from h3scale.config.strict import Strict
from h3scale.config.study import StudyRecipe
from h3scale.errors import ConfigError, DataError, MissingInputError
from h3scale.redact import without_secrets
from h3scale.study.ledger import Ledger, file_hash, recipe_text
from h3scale.study.tasks import ENSEMBLE, Model, Plan, Task

SUFFIX = ".json.gz"
_DECIMALS = 6
_FOLDERS = re.compile(r"""(?<![^\s=\[{"',:])/(?:[^\s\]}"',/]+/)*""")  # what leads to a file from the root

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


def gather_seed(recipe: StudyRecipe, plan: Plan, ledger: Ledger, seed: int) -> Evidence:
    """Reads what a seed's tasks have left, writes and gives its file."""
    results = {model.name: _result(plan, ledger, seed, model) for model in plan.models}
    columns = {name: {task: _columns(items) for task, items in result["items"].items()} for name, result in results.items()}
    shared = {task: _alike([each[task] for each in columns.values()]) for task in next(iter(columns.values()))}
    models = {
        model.name: {
            "group": model.group,
            "cost": _cost(recipe, plan, ledger, model, seed),
            "scores": results[model.name]["scores"],
            "items": {task: _without(own, shared[task]) for task, own in columns[model.name].items()},
            "notes": results[model.name]["notes"],
        }
        for model in plan.models
    }
    evidence = {
        "format": 1,
        "version": __version__,
        "code": _code(plan, ledger, seed),
        "recipe": _without_folders(recipe.model_dump()) | {"data": None, "suite_data": None, "seeds": [seed]},
        "made_from": _made_from(plan),
        "seed": seed,
        "suite": next(iter(results.values()))["suite"],
        "compare": plan.compare,
        "items": shared,
        "models": models,
        "pairs": (read_json(ledger.out / f"seed-{seed}/explain/explain.json")["whole"] or {}).get("pairs"),
    }
    path = ledger.out / f"seed-{seed}{SUFFIX}"
    write_whole(path, gzip.compress(json.dumps(without_secrets(evidence), ensure_ascii=False).encode(), mtime=0))
    return read_seed(path)


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


def _made_from(plan: Plan) -> dict[str, str]:
    """By what reads it, since two folders may have files of one name."""
    recipes = {Path(task.recipe).name: task.recipe for task in plan.tasks if task.recipe}
    files = {f"{task.kind}: {file.name}": file for task in plan.tasks for file in task.files}
    hashes = {name: hashlib.sha256(recipe_text(recipe).encode()).hexdigest() for name, recipe in recipes.items()}
    return dict(sorted((hashes | {name: file_hash(file) for name, file in files.items()}).items()))


def _code(plan: Plan, ledger: Ledger, seed: int) -> list[str]:
    """Which states of the source have run the tasks of a seed, and those that all seeds share."""
    entries = [
        ledger.entry(task) for task in plan.tasks if task.name.startswith(f"seed-{seed}/") or not task.name.startswith("seed-")
    ]
    return sorted({entry.code for entry in entries if entry is not None and entry.code})


def _without_folders(value: Any) -> Any:
    """Texts with files that are named from the root down to their names: where they lie is nobody else's."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value) or value
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    return [_without_folders(each) for each in value] if isinstance(value, list | tuple) else value


def _result(plan: Plan, ledger: Ledger, seed: int, model: Model) -> dict[str, Any]:
    made = ledger.out / plan.task(f"seed-{seed}/scores/{model.group}").makes[0]
    return dict(read_json(made if made.suffix == ".json" else made / f"{model.name}.json")["suite"])


def _columns(items: Sequence[Mapping[str, Any]]) -> Columns:
    """All items of a task have the same keys."""
    return {key: [_short(item[key]) for item in items] for key in (items[0] if items else ())}


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _short(value: Any) -> Any:
    return round(value, _DECIMALS) if isinstance(value, float) else value


def _alike(tables: Sequence[Columns]) -> Columns:
    """The columns that are the same in all."""
    return {key: values for key, values in tables[0].items() if all(table.get(key) == values for table in tables)}


def _without(columns: Columns, shared: Columns) -> Columns:
    return {key: values for key, values in columns.items() if key not in shared}


def _cost(recipe: StudyRecipe, plan: Plan, ledger: Ledger, model: Model, seed: int) -> dict[str, Any]:
    names = recipe.alignments if model.group == ENSEMBLE else [model.name]
    tasks = {task.name: task for name in names for task in plan.lineage(f"seed-{seed}/{name}") if task.is_cost}
    both = [parameters_of(ModelFolder(ledger.out / f"seed-{seed}/models/{name}")) for name in names]
    return {
        "parameters": {"total": sum(total for total, _ in both), "active": sum(active for _, active in both)},
        "tokens": sum(task.tokens for task in tasks.values()),
        "train_s": _seconds(ledger, (task for task in tasks.values() if task.tokens)),
        "make_s": _seconds(ledger, (task for task in tasks.values() if not task.tokens)),
    }


def _seconds(ledger: Ledger, tasks: Iterable[Task]) -> float | None:
    """None where the time of one is not known: it was cut off and went on."""
    took = [entry.took_s for entry in map(ledger.entry, tasks) if entry is not None]
    return None if None in took else float(sum(time for time in took if time is not None))


def parameters_of(folder: ModelFolder) -> tuple[int, int]:
    """Parameters of a model folder: all, and those of the experts that a token takes and of what experts share."""
    sizes = {name: int(np.prod(spec.shape)) for name, spec in folder.specs.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total, config = sum(sizes.values()), folder.config
    if not experts:
        return total, total
    num_experts = config.get("num_local_experts") or config["num_experts"]
    return total, total - experts + experts * int(config["num_experts_per_tok"]) // int(num_experts)
