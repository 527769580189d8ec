"""Real tokens a second of a whole training step of a fused model, ours and others', in rounds that take turns."""

from collections.abc import Callable
from pathlib import Path

import torch
import train_ours
import train_peers
from measure import Row, Timing
from ranks import Ranks
from train_models import recipe, small, write_deepspeed, write_fused, write_records
from train_peers import DENSE

ZERO_2 = "h3scale, ZeRO-2"
OURS = {  # name: ZeRO stage, ranks (all of them hold different experts)
    "h3scale, ZeRO-3": (3, 1),
    ZERO_2: (2, 1),
    "h3scale, ZeRO-3, two ranks, EP 2": (3, 2),
}
SAME_LOSS = 1e-4
GENERAL = 1


def speed(tiny: bool, work: Path) -> list[Row]:
    """The first step of each has the same LM loss, on the same records and weights; the dense model has weights of its own."""
    rounds = 1 if tiny else 7
    write_records(work, tiny, rounds + 1)
    write_fused(work / "model", small(tiny), 1, GENERAL)
    started = {name: _ours(work, rounds + 1, *OURS[name]) for name in OURS if name != ZERO_2 or not tiny}
    peers = Ranks(train_peers.__file__, [str(work), str(rounds + 1)])
    try:
        asked: dict[str, Callable[[int], list[Row]]] = {
            **{name: lambda step, ranks=ranks: ranks.ask(str(step)) for name, ranks in started.items()},  # type: ignore[misc]
            **{name: lambda step, name=name: peers.ask(f"{name} {step}") for name in train_peers.NAMES},  # type: ignore[misc]
        }
        answers = {name: [ask(0)] for name, ask in asked.items()}  # not counted
        _check({name: found[0][0]["lm"] for name, found in answers.items() if name != DENSE})
        for step in range(1, rounds + 1):
            for name, ask in asked.items():
                answers[name].append(ask(step))
    finally:
        for ranks in (*started.values(), peers):
            ranks.__exit__(None, None, None)
    return _rows(answers)


def _ours(work: Path, steps: int, stage: int, num_ranks: int) -> Ranks:
    name = f"zero-{stage}-{num_ranks}"
    write_deepspeed(work / f"{name}.json", stage)
    settings = recipe(work, work / "model", work / f"{name}.json", steps, ep_size=num_ranks)
    path = work / f"{name}-recipe.json"
    path.write_text(settings.model_dump_json(exclude_unset=True), encoding="utf-8")
    return Ranks(train_ours.__file__, [str(path), str(work / name)], num_ranks)


def _check(losses: dict[str, float]) -> None:
    wrong = {name: loss for name, loss in losses.items() if abs(loss - next(iter(losses.values()))) > SAME_LOSS}
    if wrong:
        raise AssertionError(f"not the same LM loss in the first step: {losses}")


def _rows(answers: dict[str, list[list[Row]]]) -> list[Row]:
    """CPU time is of all ranks together, wall time of the slowest; ratios are of the least CPU time, on a GPU of wall time."""
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    rows, timings = [], {}
    for name, (first, *rounds) in answers.items():
        timing = Timing([max(r["wall_s"] for r in ranks) for ranks in rounds], [sum(r["cpu_s"] for r in ranks) for ranks in rounds])
        timings[name] = timing
        tokens = [ranks[0]["tokens"] for ranks in rounds]
        per_s = {
            f"tokens_per_{c}": max(t / s for t, s in zip(tokens, getattr(timing, c), strict=True)) for c in ("cpu_s", "wall_s")
        }
        row = {"what": name, "ranks": len(first), "first_lm": first[0]["lm"], **per_s, "padding": first[0].get("padding", "")}
        rows.append({**row, "tokens": sum(tokens), **timing.figures()})
    ours = timings[next(iter(OURS))].best(clock)
    return [{**row, "h3scale_is_faster": timings[row["what"]].best(clock) / ours} for row in rows]
