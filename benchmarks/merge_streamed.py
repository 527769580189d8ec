"""Seconds of whole merges beside mergekit and cp, of adapters beside full models, and memory as the model grows."""

import json
import os
import shutil
import statistics
from pathlib import Path

import torch
from measure import Row
from merge_models import NUM_MODELS, TINY, write_models
from merge_tools import DENSITY, FLOOR, MERGEKIT, OURS
from ranks import Peaks, Ranks
from safetensors import safe_open

SCRIPT = str(Path(__file__).with_name("merge_tools.py"))
ROUNDS = 5
METHODS = ("ties", "task_arithmetic", "linear")
MODELS = [f"model-{i}" for i in range(NUM_MODELS)]
ADAPTERS = [f"adapter-{i}" for i in range(NUM_MODELS)]
CHECKED = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")
PARENTS, OUTPUT = f"{FLOOR} of the parents", f"{FLOOR} of as much as is written"
ROUNDED = 2**-8  # bf16: no value is further from the oracle's than half its last place


def streamed(size: str, work: Path, peer: Path | None) -> Row:
    """TIES, task arithmetic and linear: bf16 in and out, three models of one base."""
    num_parameters = write_models(work, size)
    ask: dict[str, Row] = {f"{OURS}, {method}": {"way": OURS, "method": method} for method in METHODS}
    ask |= {f"{OURS}, {method}, sha256 of all": {"way": OURS, "method": method, "hashed": True} for method in METHODS[1:2]}
    if peer:
        ask |= {f"{MERGEKIT}, {method}": {"way": MERGEKIT, "method": method} for method in METHODS}
    ask = {name: question | {"models": MODELS} for name, question in ask.items()}
    ask |= {PARENTS: {"way": FLOOR, "models": ["base", *MODELS]}, OUTPUT: {"way": FLOOR, "models": ["base"]}}
    times, errors, said = _interleaved(work, ask, peer, 1 if size == TINY else ROUNDS)
    rows = []
    for name, rounds in times.items():
        row = {"what": name, "parameters": num_parameters, **_figures(rounds)}
        if name in errors:
            row["error"] = errors[name]
        if name.startswith(OURS):
            row["times_cp_of_parents"] = row["cpu_s_min"] / _least(times[PARENTS])
            row["times_cp_of_output"] = row["cpu_s_min"] / _least(times[OUTPUT])
            theirs = times.get(name.replace(OURS, MERGEKIT))
            row |= {"faster_than_mergekit": _least(theirs) / row["cpu_s_min"]} if theirs else {}
        rows.append(row)
    if not peer:
        rows += [{"what": f"{MERGEKIT}, {method}", "not_run": "not installed"} for method in METHODS]
    versions = (
        {"mergekit": said[f"{MERGEKIT}, ties"]["version"], "mergekit's torch": said[f"{MERGEKIT}, ties"]["torch"]} if peer else {}
    )
    return {"rows": rows, "versions": versions or {"mergekit": None}}


def adapters(size: str, work: Path, peer: Path | None) -> Row:
    """Whole merges of LoRA adapters: the methods on matrices beside linear, and the same linear merge of full models."""
    num_parameters = write_models(work, size, adapters=True)
    methods = ("linear", "tsv_m", "resm")
    ask: dict[str, Row] = {f"{OURS}, {method}": {"way": OURS, "method": method, "models": ADAPTERS} for method in methods}
    times, _, _ = _interleaved(work, ask, None, 1 if size == TINY else ROUNDS)
    linear = _least(times[f"{OURS}, linear"])
    rows = []
    for name, rounds in times.items():
        row = {"what": name, "parameters": num_parameters, **_figures(rounds)}
        rows.append(row | {"times_linear": row["cpu_s_min"] / linear})
    return {"rows": rows}


def memory(size: str, work: Path, peer: Path | None) -> Row:
    """Anonymous memory of a fresh process that merges, above what it held after its imports and a tiny merge."""
    rows: list[Row] = []
    write_models(work / "first", TINY)
    for each in (TINY,) if size == TINY else ("0.04 B", size):
        num_parameters = write_models(work / each, each)
        largest = _largest(work / each / "base" / "model.safetensors")
        for method in METHODS[:1] if size == TINY else ("linear", "ties", "tsv_m", "resm"):
            before, peak = _peak(work, each, method)
            rows.append(
                {
                    "what": f"{OURS}, {method}",
                    "parameters": num_parameters,
                    "largest_tensor_mib": largest / 2**20,
                    "peak_anon_mib": peak,
                    "above_tiny_mib": peak - before,
                }
            )
        shutil.rmtree(work / each)
    return {"rows": rows}


def _peak(work: Path, size: str, method: str) -> tuple[float, float]:
    """Of a fresh process: the most that it holds while it merges the first model, then this one."""
    peaks = []
    with Ranks(SCRIPT, [OURS]) as ranks:
        for folder in (work / "first", work / size):
            with Peaks(ranks) as peak:
                question = {"folder": str(folder), "method": method, "models": MODELS, "out": str(work / "out")}
                ranks.ask(json.dumps(question))
                held = ranks.memory_mib()[0]
            peaks.append(max(peak.mib[0], held))
            shutil.rmtree(work / "out")
    return peaks[0], peaks[1]


def _largest(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def _interleaved(
    work: Path, ask: dict[str, Row], peer: Path | None, rounds: int
) -> tuple[dict[str, list[Row]], dict[str, float], dict[str, Row]]:
    """Answers of each round, errors and answers of one before them, which is not counted and in which results are checked.

    What was written is deleted before the next one's turn: else all wait for a disk that none is asked to wait for.
    """
    pythons = {MERGEKIT: str(peer)} if peer else {}
    workers = {
        way: Ranks(SCRIPT, [way], **({"python": pythons[way]} if way in pythons else {}))
        for way in {q["way"] for q in ask.values()}
    }
    out = work / "out"
    times: dict[str, list[Row]] = {name: [] for name in ask}
    errors, said = {}, {}
    try:
        for name, question in ask.items():
            said[name] = workers[question["way"]].ask(json.dumps(question | {"folder": str(work), "out": str(out)}))[0]
            if question.get("method") in METHODS and question["models"] == MODELS:
                errors[name] = _error(work, out, question["method"])
                assert question["way"] != OURS or errors[name] < ROUNDED, (name, errors[name])
            shutil.rmtree(out)
        os.sync()
        for _ in range(rounds):
            for name, question in ask.items():
                times[name].append(workers[question["way"]].ask(json.dumps(question | {"folder": str(work), "out": str(out)}))[0])
                shutil.rmtree(out)
    finally:
        for each in workers.values():
            each.__exit__(None, None, None)
    return times, errors, said


def _error(work: Path, out: Path, method: str) -> float:
    """Relative Frobenius distance of merged weights from those of fp64, over the tensors that are checked."""
    distance = total = 0.0
    for name in CHECKED:
        base, *models = (_tensor(work / each, name).double() for each in ("base", *MODELS))
        expected = base + _plain([model - base for model in models], method)
        distance += float((_tensor(out, name).double() - expected).square().sum())
        total += float(expected.square().sum())
    return (distance / total) ** 0.5


def _plain(deltas: list[torch.Tensor], method: str) -> torch.Tensor:
    if method == "ties":
        kept = int(DENSITY * deltas[0].numel())
        trimmed = [delta * (delta.abs() >= delta.abs().flatten().sort().values[-kept]) for delta in deltas]
        sign = sum(trimmed[1:], trimmed[0]).sign()
        agreeing = [delta * (delta.sign() == sign) for delta in trimmed]
        return sum(agreeing[1:], agreeing[0]) / sum((each != 0).double() for each in agreeing).clamp_min(1)  # type: ignore[union-attr]
    total = sum(deltas[1:], deltas[0])
    return total / len(deltas) if method == "linear" else total


def _tensor(folder: Path, name: str) -> torch.Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(name)


def _figures(rounds: list[Row]) -> Row:
    found: Row = {"rounds": len(rounds)}
    for clock in ("cpu_s", "wall_s"):
        values = [each[clock] for each in rounds]
        found |= {f"{clock}_min": min(values), f"{clock}_median": statistics.median(values)}
    return found


def _least(rounds: list[Row]) -> float:
    return min(each["cpu_s"] for each in rounds)
