"""What a report knows: read from a folder with evaluations, such as a demo's, for the page and the plots to draw."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h3scale.checkpoint.shards import read_json
from h3scale.errors import MissingInputError

KNOWN_ALIGNMENTS = ("helpful", "harmless", "honest")

Line = dict[str, float]


@dataclass(frozen=True)
class Findings:
    """All that a report shows. `runs`: metrics by run name, one line a step. `main`: the model the report is about."""

    results: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    runs: dict[str, list[Line]]
    alignments: list[str]
    main: str
    experts: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """NLL by model and alignment: base, aligned models, others by name, the main one last."""
        models = self.results.get("models", {})
        order = dict.fromkeys(("base", *self.alignments, "mixture", *sorted(models)))
        last = [name for name in ("fused_init", self.main) if name in models]
        return {name: models[name] for name in [*(n for n in order if n in models and n not in last), *last]}

    @property
    def evaluation(self) -> dict[str, Any]:
        """The main model's own file; empty when it is not there."""
        return self.evaluations.get(self.main, {})

    @property
    def suites(self) -> dict[str, dict[str, Any]]:
        """What `h3scale evaluate --suite` found, by model, the main one last."""
        found = {name: entry["suite"] for name, entry in self.evaluations.items() if "suite" in entry}
        order = [name for name in (*self.models, *found) if name in found and name != self.main]
        return {name: found[name] for name in dict.fromkeys([*order, *([self.main] if self.main in found else [])])}

    @property
    def router(self) -> dict[str, Any]:
        """What is known of the main model's router: its own file's entry over that of results.json."""
        return {**self.results.get("router", {}), **self.evaluation.get("router", {})}

    @property
    def paired(self) -> dict[str, tuple[float, float, float]]:
        """Main model minus another, mean NLL, by the other's name: difference, low, high."""
        found = self.results.get("paired") or self.evaluation.get("paired", {})
        prefix = f"{self.main} - "
        return {
            name.removeprefix(prefix): (entry.get("difference", entry.get("mean")), entry["low"], entry["high"])
            for name, entry in found.items()
        }

    def mean_nll(self, name: str) -> float:
        """Mean over the alignments of one model's NLL."""
        values = [entry["nll"] for entry in self.models[name].values()]
        return sum(values) / len(values)


def read_findings(out: Path) -> Findings:
    """Everything a report needs from a folder: of results.json and evaluation/*.json one is required.

    Without results.json the models are those whose evaluations have NLL of records.
    """
    if not out.is_dir():
        raise MissingInputError(f"{out}: no such folder")
    read = {path.stem: read_json(path) for path in sorted((out / "evaluation").glob("*.json"))}
    evaluations = {name: entry for name, entry in read.items() if "nll" in entry or "suite" in entry}
    if (out / "results.json").is_file():
        results = read_json(out / "results.json")
    elif evaluations:
        results = {"models": {name: entry["nll"] for name, entry in evaluations.items() if "nll" in entry}}
    else:
        works = f"works: h3scale evaluate MODEL ... --out {out / 'evaluation'}, or h3scale demo --out {out}"
        raise MissingInputError(f"{out}: no results.json and no evaluation/*.json of h3scale evaluate ({works})")
    main = _main_model(results, evaluations)
    router = evaluations.get(main, {}).get("router", {})
    return Findings(
        results=results,
        evaluations=evaluations,
        runs=_runs(out),
        alignments=_alignments(results, evaluations, router),
        main=main,
        experts=[(expert["name"], expert["alignment"]) for expert in router.get("experts", [])],
    )


def _main_model(results: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    """The fused one, the one that `h3scale evaluate` has set against the others, one with a router, or the last."""
    names = list(results.get("models", {})) or list(evaluations)
    entries = {name: evaluations.get(name, {}) for name in names}
    compared = [name for name, entry in entries.items() if "paired" in entry or "paired" in entry.get("suite", {})]
    routed = [name for name, entry in entries.items() if "router" in entry]
    return "fused" if "fused" in results.get("models", {}) else (compared or routed or names or [""])[-1]


def _alignments(results: dict[str, Any], evaluations: dict[str, dict[str, Any]], router: dict[str, Any]) -> list[str]:
    """Those of the NLL, else of the suites; the model's own order, else the usual one, then the alphabet."""
    found = {alignment for model in results.get("models", {}).values() for alignment in model}
    suites = [entry["suite"]["scores"] for entry in evaluations.values() if "suite" in entry]
    found = found or {score["alignment"] for scores in suites for score in scores if score["alignment"]}
    first = [a for a in (*router.get("alignments", ()), *KNOWN_ALIGNMENTS) if a in found]
    return list(dict.fromkeys([*first, *sorted(found)]))


def _runs(out: Path) -> dict[str, list[Line]]:
    """Metrics of every run under checkpoints/ and models/, one line a step: its own figures and those of held-out records.

    Of figures written twice (a resumed run), the later ones.
    """
    runs = {}
    for folder in (out / "models", out / "checkpoints"):
        for path in sorted(folder.rglob("metrics.jsonl")):
            steps: dict[float, Line] = {}
            for text in path.read_text(encoding="utf-8").splitlines():
                line = _parse(text)
                if "step" in line:
                    steps.setdefault(line["step"], {}).update(line)
            if steps:
                runs[path.parent.relative_to(folder).as_posix()] = [steps[step] for step in sorted(steps)]
    return runs


def _parse(text: str) -> Line:
    """The finite numbers of one line; nothing for a line that was cut while being written."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {key: number for key, number in value.items() if isinstance(number, (int, float)) and math.isfinite(number)}
