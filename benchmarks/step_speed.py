"""Real tokens a second, and MFU, of whole training steps: ours, ours with DeepSpeed's experts, a dense model as active, and others.

On a CPU all are started and take turns. Of a GPU's memory each needs most, so there they come one after the other.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_ours
import train_peers
from measure import Row, Timing, said
from moe_speed import matmul
from ranks import Ranks
from train_models import AS_ON_GPU, LENGTH, TINY, TOP_K, dense_config, recipe, write_deepspeed, write_fused, write_records
from train_peers import EAGER, GROUPED, LORA, PADDED, PEFT, PUBLISHED

from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.recipe import TrainRecipe
from h3scale.train.peak import known_peak

OURS = "h3scale"
DEEPSPEED = "h3scale with DeepSpeed's experts"
DENSE = "h3scale, dense of the same active size"
OURS_LORA = "h3scale, LoRA"
OTHERS = (GROUPED, PADDED, PUBLISHED, EAGER, PEFT)
BESIDE = {PEFT: OURS_LORA}  # what another is compared with, where it is not OURS
SAME_LOSS = 2e-2 if AS_ON_GPU else 1e-4  # relative; on a GPU in bf16
SMALL: Row = {  # what a CPU trains a step of in a second
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
}
LARGE: Row = {  # Llama-2-7B's width; fp32 masters, moments and gradients of all of it fit one H200
    **SMALL,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Contender:
    """`start` begins its process; `question` is what it is asked before the number of the step."""

    start: Callable[[], Ranks]
    question: str = ""


def step(tiny: bool, work: Path) -> Iterator[Row]:
    """All have the same weights, but for the dense one, and see the same records; the LM loss of the first step says so.

    Where they come one after the other, one that fails is a line, and the rest go on; RuntimeError in the end, if it is ours.
    """
    rounds = 1 if tiny else 10 if torch.cuda.is_available() else 7
    sizes = TINY if tiny else LARGE if AS_ON_GPU else SMALL
    dtype = torch.bfloat16 if AS_ON_GPU else torch.float32
    ceiling_tflops = matmul(dtype, tiny)["tflops"]
    write_records(work, tiny, rounds + 1)
    write_fused(work / "model", sizes, 1, 0, dtype)
    write_dense(work / "dense", sizes, dtype)
    write_deepspeed(work / "zero.json", 3, bf16=AS_ON_GPU)
    contenders = dict(_contenders(work, rounds + 1))
    turns = [{name: one} for name, one in contenders.items()] if AS_ON_GPU else [contenders]
    answers: dict[str, list[Row]] = {}
    broken = []
    for together in turns:
        try:
            found = _take_turns(together, rounds + 1)
            _check({name: each[0]["lm"] for name, each in (answers | found).items() if name != DENSE})
        except Exception as error:
            if OURS in together:
                raise
            yield from ({"what": name, "not_run": said(error)} for name in together)
            broken += [f"{name}: {error}" for name in together if name in (DENSE, OURS_LORA)]
            continue
        answers |= found
        yield from (_row(name, answers, ceiling_tflops) for name in found)
    if broken:
        raise RuntimeError("; ".join(broken))


def _contenders(work: Path, steps: int) -> Iterator[tuple[str, Contender]]:
    """The most important first."""
    some = ["experts", "router"]
    trainable, ffn = (["all"], ["all"]) if AS_ON_GPU else (some, ["ffn"])

    def settings(model: str, **given: Any) -> TrainRecipe:
        return recipe(work, work / model, work / "zero.json", steps, drift={"gamma": 0.0}, **given)

    plain = settings("model", trainable=trainable)
    ours = [
        (OURS, plain, ()),
        (DENSE, settings("dense", trainable=ffn), ()),
        (OURS_LORA, settings("model", trainable=some, lora=LORA), ()),
        (DEEPSPEED, plain, ("deepspeed",)),
    ]
    for number, (name, its, words) in enumerate(ours):
        path = work / f"{number}.json"
        path.write_text(its.model_dump_json(exclude_unset=True), encoding="utf-8")
        yield name, Contender(partial(Ranks, train_ours.__file__, [str(path), str(work / path.stem), *words]))
    for name in OTHERS:
        words = [str(work), str(steps), name, ",".join(some if name == PEFT else trainable)]
        yield name, Contender(partial(Ranks, train_peers.__file__, words), f"{name} ")


def _take_turns(contenders: dict[str, Contender], steps: int) -> dict[str, list[Row]]:
    """What each answers to each step, in rounds."""
    with ExitStack() as stack:
        ranks = {name: stack.enter_context(one.start()) for name, one in contenders.items()}
        answers: dict[str, list[Row]] = {name: [] for name in contenders}
        for number in range(steps):
            for name, one in contenders.items():
                answers[name] += ranks[name].ask(f"{one.question}{number}")
    return answers


def write_dense(folder: Path, sizes: Row, dtype: torch.dtype) -> None:
    """A Llama whose FFN is as wide as the experts that a token takes."""
    from transformers import LlamaForCausalLM

    config = dense_config({**sizes, "intermediate_size": TOP_K * sizes["intermediate_size"]})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random values of billions take a CPU a minute
            LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # those that are timed need it
    assert ModelFolder(folder).config["max_position_embeddings"] == LENGTH


def _check(losses: dict[str, float]) -> None:
    first = next(iter(losses.values()))
    if any(not abs(loss - first) <= SAME_LOSS * first for loss in losses.values()):
        raise AssertionError(f"not the same LM loss in the first step: {losses}")


def _row(name: str, answers: dict[str, list[Row]], ceiling_tflops: float) -> Row:
    """Rates are of the fastest round, ratios of tokens a second; the first step does not count."""
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    beside = BESIDE.get(name, OURS)
    beside = beside if beside in answers else OURS
    rate, ours = (max(row["tokens"] / row[clock] for row in answers[each][1:]) for each in (name, beside))
    first, *rounds = answers[name]
    row = {"what": name, "first_lm": first["lm"], "tokens_per_s": rate, "padding": first.get("padding", "")}
    if "flops" in first:
        tflops = max(row["flops"] / row[clock] for row in rounds) / 1e12
        row |= {"tflops": tflops, "of_matmul": tflops / ceiling_tflops}
        peak = known_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak:
            row["mfu"] = tflops * 1e12 / peak
    timing = Timing([row["wall_s"] for row in rounds], [row["cpu_s"] for row in rounds])
    return {**row, "beside": beside, "h3scale_is_faster": ours / rate, **timing.figures()}
