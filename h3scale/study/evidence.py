"""What one seed of a study has shown: `seed-N.json.gz` holds all that results are made of, and no model.

Seeds can so be run on several machines, or one after another, and put together later. Items stand by columns: what all models have
alike (prompts' numbers, tokens) once, numbers of a model with it, to six decimals.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h3scale import __version__
from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.config.base import checked
from h3scale.config.study import StudyRecipe
from h3scale.errors import ConfigError, DataError, MissingInputError
from h3scale.redact import without_secrets
from h3scale.study.ledger import Ledger, file_hash, recipe_text
from h3scale.study.tasks import ENSEMBLE, Model, Plan, Task

SUFFIX = ".json.gz"
_FORMAT = 1
_DECIMALS = 6
_PLACES = {"data": None, "suite_data": None}  # what differs from machine to machine; `made_from` has what lies there

Evidence = dict[str, Any]
Columns = dict[str, list[Any]]


def gather_seed(recipe: StudyRecipe, plan: Plan, ledger: Ledger, seed: int) -> Evidence:
    """Reads what a seed's tasks have left, writes and gives its file."""
    results = {model.name: _result(plan, ledger, seed, model) for model in plan.models}
    explained = read_json(ledger.out / f"seed-{seed}/explain/explain.json")
    numbers = {name: {task: _columns(items) for task, items in result["items"].items()} for name, result in results.items()}
    shared = {task: _alike([each[task] for each in numbers.values()]) for task in next(iter(numbers.values()))}
    models = {}
    for model in plan.models:
        own = {
            task: {key: values for key, values in columns.items() if key not in shared[task]}
            for task, columns in numbers[model.name].items()
        }
        models[model.name] = {
            "group": model.group,
            **_cost(recipe, plan, ledger, model, seed),
            "scores": results[model.name]["scores"],
            "items": own,
            "notes": results[model.name]["notes"],
        }
    evidence = {
        "format": _FORMAT,
        "version": __version__,
        "code": sorted({entry.code for entry in ledger.entries() if entry.done and entry.code}),
        "recipe": recipe.model_dump() | _PLACES | {"recipes": Path(recipe.recipes).name, "seeds": [seed]},
        "made_from": _made_from(plan),
        "seed": seed,
        "suite": next(iter(results.values()))["suite"],
        "compare": plan.compare,
        "items": shared,
        "models": models,
        "pairs": (explained["whole"] or {}).get("pairs"),
    }
    path = ledger.out / f"seed-{seed}{SUFFIX}"
    partial = path.with_name(f".partial-{path.name}")
    partial.write_bytes(gzip.compress(json.dumps(without_secrets(evidence), ensure_ascii=False).encode(), mtime=0))
    partial.replace(path)
    return read_seed(path)


def read_seed(path: Path) -> Evidence:
    """One seed's file. MissingInputError (66), DataError (65)."""
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: not what h3scale study leaves of a seed ({error})") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DataError(f"{path}: not what h3scale study leaves of a seed (works: seed-N{SUFFIX} in a study's folder)")
    return found


def read_seeds(paths: Sequence[Path]) -> list[Evidence]:
    """Several seeds of one study, in the order of their numbers. ConfigError (78) where they are not of one, with what differs."""
    found = [(path, read_seed(path)) for path in paths]
    ours = _identity(found[0][1])
    for path, evidence in found[1:]:
        theirs = _identity(evidence)
        unlike = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if unlike:
            raise ConfigError(
                f"{path}: not as in {found[0][0]}: {', '.join(unlike)} (works: seeds of the same recipes and records)"
            )
    seeds = sorted(evidence["seed"] for _, evidence in found)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"two files of one seed: {', '.join(map(str, seeds))} (works: one of each)")
    return sorted((evidence for _, evidence in found), key=lambda evidence: evidence["seed"])


def _identity(evidence: Evidence) -> dict[str, Any]:
    """What the seeds of one study have in common, by what a finding calls it."""
    recipe = {key: value for key, value in evidence["recipe"].items() if key != "seeds"}
    return {**recipe, **evidence["made_from"], "suite": evidence["suite"], "models": list(evidence["models"])}


def recipe_of(seeds: Sequence[Evidence]) -> StudyRecipe:
    """The recipe that all are of."""
    return checked(StudyRecipe, {**seeds[0]["recipe"], "seeds": [evidence["seed"] for evidence in seeds]}, "recipe")


def results_of(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """The suite's result of each model (see evaluation.suite.result_of)."""
    found = {}
    for name, model in evidence["models"].items():
        items = {task: _rows(shared | model["items"][task]) for task, shared in evidence["items"].items()}
        found[name] = {"suite": evidence["suite"], "scores": model["scores"], "items": items, "notes": model["notes"]}
    return found


def _made_from(plan: Plan) -> dict[str, str]:
    """Hashes of the recipes and records."""
    recipes = {task.recipe for task in plan.tasks if task.recipe}
    files = {file for task in plan.tasks for file in task.files}
    hashes = {Path(recipe).name: hashlib.sha256(recipe_text(recipe).encode()).hexdigest() for recipe in recipes}
    return dict(sorted((hashes | {file.name: file_hash(file) for file in files}).items()))


def _result(plan: Plan, ledger: Ledger, seed: int, model: Model) -> dict[str, Any]:
    made = ledger.out / plan.task(f"seed-{seed}/scores/{model.group}").makes[0]
    return dict(read_json(made if made.suffix == ".json" else made / f"{model.name}.json")["suite"])


def _columns(items: Sequence[Mapping[str, Any]]) -> Columns:
    """Null where an item has no such number."""
    keys = list(dict.fromkeys(key for item in items for key in item))
    return {key: [_short(item.get(key)) for item in items] for key in keys}


def _rows(columns: Columns) -> list[dict[str, Any]]:
    rows = zip(*columns.values(), strict=True)
    return [{key: value for key, value in zip(columns, row, strict=True) if value is not None} for row in rows]


def _short(value: Any) -> Any:
    return round(value, _DECIMALS) if isinstance(value, float) else value


def _alike(tables: Sequence[Columns]) -> Columns:
    """The columns that are the same in all."""
    return {key: values for key, values in tables[0].items() if all(table.get(key) == values for table in tables)}


def _cost(recipe: StudyRecipe, plan: Plan, ledger: Ledger, model: Model, seed: int) -> dict[str, Any]:
    """Parameters, tokens trained on after the base, and seconds of training and of all else, where they are known."""
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
    return None if None in took else sum(time for time in took if time is not None)


def parameters_of(folder: ModelFolder) -> tuple[int, int]:
    """Parameters of a model folder: all, and those of the experts that a token takes and of what experts share."""
    sizes = {name: int(np.prod(spec.shape)) for name, spec in folder.specs.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total, config = sum(sizes.values()), folder.config
    if not experts:
        return total, total
    num_experts = config.get("num_local_experts") or config["num_experts"]
    return total, total - experts + experts * int(config["num_experts_per_tok"]) // int(num_experts)
