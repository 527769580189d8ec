"""What each loss, the metrics and activation checkpointing add to a step, on one engine and in rounds that take turns.

A rank of its own: `python benchmarks/train_overhead.py FOLDER`, which has a recipe for each of VARIANTS.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Row, Timing
from ranks import Ranks, serve, timed
from train_models import recipe, small, write_deepspeed, write_fused, write_records

from h3scale.config.recipe import TrainRecipe

PLAIN = "LM alone, no metrics"
CHECKPOINTED = "+ activation checkpointing"
ROUTER: Row = {"loss_weight": 0.1}
BALANCED: Row = {**ROUTER, "z_weight": 1e-3, "balance_weight": 1e-2}
NO_DRIFT: Row = {"drift": {"gamma": 0.0}}


@dataclass(frozen=True)
class Variant:
    """`base` is what it is compared with; `given` is the recipe; without `routed` the step does not look at the router."""

    base: str
    given: Row
    routed: bool = True


VARIANTS = {
    "+ metrics of the LM loss, JSONL": Variant(PLAIN, NO_DRIFT, routed=False),
    "+ metrics of the routing": Variant("+ metrics of the LM loss, JSONL", {**NO_DRIFT, "router": {"loss_weight": 0.0}}),
    "+ router loss": Variant("+ metrics of the routing", {**NO_DRIFT, "router": ROUTER}),
    "+ z-loss": Variant("+ router loss", {**NO_DRIFT, "router": {**ROUTER, "z_weight": 1e-3}}),
    "+ balance": Variant("+ z-loss", {**NO_DRIFT, "router": BALANCED}),
    "+ drift of weights": Variant("+ router loss", {"router": ROUTER, "drift": {"gamma": 0.1}}),
    "+ drift of activations": Variant("+ router loss", {"router": ROUTER, "drift": {"gamma": 0.1, "kind": "activations"}}),
    CHECKPOINTED: Variant("+ router loss", {**NO_DRIFT, "router": ROUTER}),
    "+ TensorBoard": Variant("+ router loss", {**NO_DRIFT, "router": ROUTER, "tracking": {"live": False, "peak_tflops": 1.0}}),
}
EXPERTS_PER_ALIGNMENT = 2  # for a balance there has to be something to balance


def overhead(tiny: bool, work: Path) -> list[Row]:
    """Shares of the step with the LM loss alone."""
    rounds = 1 if tiny else 15
    write_records(work, tiny, rounds + 1)
    write_fused(work / "model", small(tiny), EXPERTS_PER_ALIGNMENT, 0)
    write_deepspeed(work / "zero-3.json", 3)
    for number, variant in enumerate(VARIANTS.values()):
        settings = recipe(work, work / "model", work / "zero-3.json", rounds + 1, **variant.given)
        (work / f"recipe-{number}.json").write_text(settings.model_dump_json(exclude_unset=True), encoding="utf-8")
    names = [PLAIN, *VARIANTS]
    timings = {name: Timing() for name in names}
    with Ranks(__file__, [str(work)]) as ranks:
        for step in range(rounds + 1):
            for name in names:
                (found,) = ranks.ask(f"{name}|{step}")

                if step:  # the first is not counted
                    timings[name].cpu_s.append(found["cpu_s"])
                    timings[name].wall_s.append(found["wall_s"])
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    plain = timings[PLAIN].best(clock)
    rows = []
    for name in names:
        base = VARIANTS[name].base if name in VARIANTS else name
        mine, other = getattr(timings[name], clock), getattr(timings[base], clock)
        shares = {
            "share": (min(mine) - min(other)) / plain,
            "share_by_rounds": statistics.median(a - b for a, b in zip(mine, other, strict=True)) / plain,
        }
        rows.append({"what": name, "beside": base, **shares, **timings[name].figures()})
    return rows


def rank(work: Path) -> None:
    """All variants step the same weights; what one leaves in the engine is taken out while another runs."""
    import train_ours

    settings = [TrainRecipe.model_validate_json(path.read_text("utf-8")) for path in sorted(work.glob("recipe-*.json"))]
    first = train_ours.begin(settings[0], work / "lines-start")
    engine, loader = first.run.engine, first.loader
    steps: dict[str, Callable[[int], Row]] = {PLAIN: lambda step: _plain(first, step)}
    experts = [module for module in engine.module.modules() if type(module).__name__ == "ChosenExperts"]
    for number, (name, variant) in enumerate(VARIANTS.items()):
        run = first.run if variant.routed else replace(first.run, expert_map=None)
        with _forwards(experts) as own:
            made = train_ours.with_engine(settings[number], run, loader, work / f"lines-{number}")
            patched = [vars(module).get("forward") for module in experts]
        steps[name] = _step(made, experts, patched if patched != own else [], name == CHECKPOINTED)

    def answer(question: str) -> Row:
        name, _, step = question.partition("|")
        found = timed(lambda: steps[name](int(step)))
        return {key: found[key] for key in ("lm", "cpu_s", "wall_s")}

    serve(answer)


def _step(made: Any, experts: list[Any], forwards: list[Any], checkpointed: bool) -> Callable[[int], Row]:
    model = made.run.engine.module

    def step(number: int) -> Row:
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with _forwards(experts):
            for module, forward in zip(experts, forwards, strict=bool(forwards)):
                module.forward = forward
            found: Row = made.step(number)
        if checkpointed:
            model.gradient_checkpointing_disable()
        return found

    return step


@contextmanager
def _forwards(experts: list[Any]) -> Iterator[list[Any]]:
    """Gives the experts' own forwards (None: the class's), and puts them back."""
    own = [vars(module).get("forward") for module in experts]
    try:
        yield own
    finally:
        for module, forward in zip(experts, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _plain(steps: Any, number: int) -> Row:
    """A step as short as can be: nothing but what moves the weights by the LM loss."""
    from h3scale.data.collate import IGNORE
    from h3scale.data.loader import rows_of_rank

    engine, loader = steps.run.engine, steps.loader
    batch = loader.batch(number)
    targets, micro_batches, lm = loader.targets_in(batch), steps.run.micro_batches, 0.0
    for rows in rows_of_rank(batch, 0, 1, steps.recipe.rows_per_micro_batch):
        tensors = {name: tensor.to(engine.device) for name, tensor in vars(loader.tensors(rows, 0)).items()}
        output = engine(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False)
        logits, wanted = output.logits.flatten(0, 1), tensors["targets"].flatten()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / targets
        engine.backward(loss * micro_batches)
        lm += loss.item()
        engine.step()
    return {"lm": lm}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank(Path(sys.argv[1]))
