"""Gathers what a seed's tasks have left into the seed's file, `seed-N.json.gz`."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h3scale import __version__
from h3scale.checkpoint.shards import ModelFolder, read_json, write_whole
from h3scale.config.study import StudyRecipe
from h3scale.redact import without_secrets
from h3scale.study.evidence import Columns, Evidence, read_seed
from h3scale.study.ledger import Ledger, file_hash, recipe_text
from h3scale.study.tasks import ENSEMBLE, Model, Plan, Task

_DECIMALS = 6
_FOLDERS = re.compile(r"""(?<![^\s=\[{"',:])/(?:[^\s\]}"',/]+/)*""")  # what leads to a file from the root


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
    path = ledger.out / f"seed-{seed}.json.gz"
    write_whole(path, gzip.compress(json.dumps(without_secrets(evidence), ensure_ascii=False).encode(), mtime=0))
    return read_seed(path)


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
