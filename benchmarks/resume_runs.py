"""Whole training runs of two ranks that save, are killed, and go on."""

import json
import random
import statistics
import time
from pathlib import Path

import resume_rank
from measure import Row
from ranks import Ranks
from train_models import recipe, small, write_deepspeed, write_fused, write_records

from h3scale.exit_status import kept_step

RANKS = 2
GENERAL = 1
FIGURES = ("step", "lm", "router", "drift", "grad_norm")


def save(tiny: bool, work: Path) -> list[Row]:
    """Each save beside DeepSpeed's own of the same engine, and beside a copy of the bytes that is flushed; in turns."""
    rounds = 2 if tiny else 7
    path = _recipe(tiny, work, 2 * rounds + 2, "save")
    with Ranks(resume_rank.__file__, ["save", str(path), str(work / "scratch")], RANKS) as ranks:
        (found, _) = ranks.ask("")
    steps = [json.loads(line)["seconds"] for line in (work / "save" / "metrics.jsonl").read_text().splitlines()]
    rows = [{"what": name, **_figures(seconds[1:])} for name, seconds in found["seconds"].items()]  # the first is not counted
    ours = next(row["median_s"] for row in rows if row["what"] == resume_rank.SAVE)
    rows = [{**row, "MB": found["bytes"] / 1e6, "h3scale_takes": ours / row["median_s"]} for row in rows]
    return [*rows, {"what": "a step, for comparison", **_figures(steps[1:])}]


def kills(tiny: bool, work: Path) -> list[Row]:
    """kill -9 of a rank at random moments of a run that saves after each step, until it gets to its end; its losses are checked."""
    wanted, steps = (2, 6) if tiny else (6, 12)
    whole, path = _recipe(tiny, work, steps, "whole"), _recipe(tiny, work, steps, "killed", every=1)
    rng = random.Random(1)
    anew, resumed, killed = [_start(whole, None, rng)[0]], [], 0
    while not (work / "killed").exists():
        goes_on = kept_step(work / "killed") > 0
        seconds, was_killed = _start(path, 4 * _step_s(work) if killed < wanted else None, rng)
        (resumed if goes_on else anew).append(seconds)
        killed += was_killed
    if _lines(work / "killed") != _lines(work / "whole"):
        raise AssertionError("the run that was killed has not the losses of the one that was not")
    return [
        {"what": "to the first step, from the model", **_figures(anew)},
        {"what": "to the first step, from a checkpoint", **_figures(resumed)},
        {"what": "kills", "times": killed},
    ]


def _start(path: Path, kill_within_s: float | None, rng: random.Random) -> tuple[float, bool]:
    """Seconds from the command to the first step, and whether a rank was killed before the run had ended."""
    began = time.perf_counter()
    with Ranks(resume_rank.__file__, ["begin", str(path)], RANKS) as ranks:
        ranks.ask("")
        seconds = time.perf_counter() - began
        if kill_within_s is not None:
            time.sleep(rng.uniform(0, kill_within_s))
            ranks.processes[rng.randrange(RANKS)].kill()
        codes = [process.wait() for process in ranks.processes]
    return seconds, -9 in codes


def _step_s(work: Path) -> float:
    return statistics.median(json.loads(line)["seconds"] for line in (work / "whole" / "metrics.jsonl").read_text().splitlines())


def _recipe(tiny: bool, work: Path, steps: int, name: str, every: int | None = None) -> Path:
    if not (work / "model").exists():
        write_records(work, tiny, steps)
        write_fused(work / "model", small(tiny), 1, GENERAL)
        write_deepspeed(work / "zero-3.json", 3)
    settings = recipe(work, work / "model", work / "zero-3.json", steps, ep_size=RANKS, out=str(work / name), save={"every": every})
    path = work / f"{name}.json"
    path.write_text(settings.model_dump_json(exclude_unset=True), encoding="utf-8")
    return path


def _lines(out: Path) -> list[Row]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in FIGURES} for line in found]


def _figures(seconds: list[float]) -> Row:
    return {"times": len(seconds)} | ({"median_s": statistics.median(seconds), "best_s": min(seconds)} if seconds else {})
