"""results.json of a study: all models side by side, over its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from h3scale import __version__
from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.config.study import StudyRecipe
from h3scale.evaluation.measures import HIGHER_IS_BETTER, summarise_items
from h3scale.study.conflict import conflicts
from h3scale.study.ledger import Ledger
from h3scale.study.scores import Number, Resampler, gains, over_seeds, verdict
from h3scale.study.tasks import ENSEMBLE, Model, Plan, Task

Results = dict[int, dict[str, dict[str, Any]]]  # by seed and model


def assemble(recipe: StudyRecipe, plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """Reads what the tasks have left, writes and gives results.json; docs/study.md says what is in it."""
    found = _read(recipe, plan, ledger)
    resampler = Resampler(found[recipe.seeds[0]]["base"], recipe.alignments)
    nll = {name: np.stack([resampler.nll(found[seed][name]) for seed in recipe.seeds]) for name in found[recipe.seeds[0]]}
    compared = _Compared(recipe, resampler, nll)
    costs = {model.name: _cost(recipe, plan, ledger, model) for model in plan.models}
    models = {}
    for model in plan.models:
        scores = other_scores([found[seed][model.name] for seed in recipe.seeds])
        same = costs[model.name]["tokens"] == costs[recipe.main]["tokens"]
        models[model.name] = {
            "group": model.group,
            **costs[model.name],
            "same_tokens": same,
            **compared.of(model.name),
            "scores": scores,
        }
    results = {
        "version": __version__,
        "suite": found[recipe.seeds[0]]["base"]["suite"],
        "recipe": recipe.model_dump(),
        "alignments": recipe.alignments,
        "seeds": recipe.seeds,
        "main": recipe.main,
        "models": models,
        "comparisons": [{"one": one, "other": other, **compared.pair(one, other)} for one, other in plan.compare],
        "code": sorted({entry.code for entry in ledger.entries() if entry.done and entry.code}),
        "conflict": conflicts(recipe, resampler, nll, ledger.out),
        "notes": list(dict.fromkeys(note for each in found.values() for result in each.values() for note in result["notes"])),
    }
    write_json(ledger.out / "results.json", results)
    return results


class _Compared:
    """The models' numbers. Over several seeds the NLL is averaged first, so that a gain is not one of a lucky base."""

    def __init__(self, recipe: StudyRecipe, resampler: Resampler, nll: Mapping[str, np.ndarray]):
        self.recipe, self.resampler, self.nll = recipe, resampler, nll
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
        """One model less another on the same resamples and, over the seeds, from the same base: mean NLL and balance."""
        differences = (self.nll[one] - self.nll[other]).mean(axis=1)  # seeds, R
        items, seeds = self.resampler.number(differences.mean(axis=0)), over_seeds(differences[:, 0].tolist())
        balance = self.resampler.least_less(self._gains(self.mean, one), self._gains(self.mean, other))
        balances = [self._balance(one, at) - self._balance(other, at) for at in range(len(self.recipe.seeds))]
        balance_seeds = over_seeds(balances) if np.isfinite(balances).all() else Number(None)
        return {
            "mean_nll": asdict(items),
            "over_seeds": asdict(seeds),
            "by_seed": dict(zip(map(str, self.recipe.seeds), differences[:, 0].tolist(), strict=True)),
            "verdict": verdict(items, seeds),
            "balance": asdict(balance),
            "balance_over_seeds": asdict(balance_seeds),
            "balance_verdict": verdict(balance, balance_seeds, higher_is_better=True),
        }

    def _balance(self, name: str, at: int) -> float:
        """Of one seed."""
        return float(self._gains({other: each[at] for other, each in self.nll.items()}, name)[:, 0].min())

    def _gains(self, nll: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return gains(nll[name], nll["base"], [nll[alignment] for alignment in self.recipe.alignments])

    def _numbers(self, values_AR: np.ndarray) -> dict[str, Any]:
        return {a: asdict(self.resampler.number(values_R)) for a, values_R in zip(self.recipe.alignments, values_AR, strict=True)}


def _read(recipe: StudyRecipe, plan: Plan, ledger: Ledger) -> Results:
    """The suite's result of each model and seed."""
    found: Results = {}
    for seed in recipe.seeds:
        found[seed] = {}
        for model in plan.models:
            made = ledger.out / plan.task(f"seed-{seed}/scores/{model.group}").makes[0]
            path = made if made.suffix == ".json" else made / f"{model.name}.json"
            found[seed][model.name] = read_json(path)["suite"]
    return found


def _cost(recipe: StudyRecipe, plan: Plan, ledger: Ledger, model: Model) -> dict[str, Any]:
    """Parameters, tokens trained on after the base, and seconds of training and of all else, mean over the seeds that are known."""
    tokens, train_s, make_s = 0, [], []
    for seed in recipe.seeds:
        if model.group == ENSEMBLE:
            last = [f"seed-{seed}/{alignment}" for alignment in recipe.alignments]
        else:
            last = [f"seed-{seed}/{model.name}"]
        tasks = {task.name: task for name in last for task in plan.lineage(name) if task.is_cost}
        tokens = sum(task.tokens for task in tasks.values())
        train_s.append(_seconds(ledger, [task for task in tasks.values() if task.tokens]))
        make_s.append(_seconds(ledger, [task for task in tasks.values() if not task.tokens]))
    return {"parameters": _parameters(recipe, ledger, model), "tokens": tokens, "train_s": _mean(train_s), "make_s": _mean(make_s)}


def _seconds(ledger: Ledger, tasks: Sequence[Task]) -> float | None:
    """None where the time of one is not known: it was cut off and went on."""
    took = [entry.took_s for entry in map(ledger.entry, tasks) if entry is not None]
    return None if None in took else sum(time for time in took if time is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _parameters(recipe: StudyRecipe, ledger: Ledger, model: Model) -> dict[str, int]:
    """Stored, and those that a token meets."""
    names = recipe.alignments if model.group == ENSEMBLE else [model.name]
    both = [parameters_of(ModelFolder(ledger.out / f"seed-{recipe.seeds[0]}/models/{name}")) for name in names]
    return {"total": sum(total for total, _ in both), "active": sum(active for _, active in both)}


def parameters_of(folder: ModelFolder) -> tuple[int, int]:
    """Parameters of a model folder: all, and those of the experts that a token takes and of what experts share."""
    sizes = {name: int(np.prod(spec.shape)) for name, spec in folder.specs.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total, config = sum(sizes.values()), folder.config
    if not experts:
        return total, total
    num_experts = config.get("num_local_experts") or config["num_experts"]
    return total, total - experts + experts * int(config["num_experts_per_tok"]) // int(num_experts)


def other_scores(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The suite's scores that are no NLL, of one model with several seeds: each item's number is averaged over them first, and
    `low` and `high` are of the items; `over_seeds` has Student's interval."""
    found = []
    for place, score in enumerate(results[0]["scores"]):
        if score["metric"] != "nll":
            task, metric = score["task"], score["metric"]
            columns = zip(*(result["items"][task] for result in results), strict=True)
            averaged = [
                {**items[0], metric: float(np.mean([item[metric] for item in items]))} for items in columns if metric in items[0]
            ]
            mine = next(s for s in summarise_items(task, averaged) if (s["metric"], s["alignment"]) == (metric, score["alignment"]))
            means = [result["scores"][place]["mean"] for result in results]
            seeds = {"by_seed": means, "over_seeds": asdict(over_seeds(means))}
            found.append({**mine, **seeds, "higher_is_better": HIGHER_IS_BETTER[metric]})
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
