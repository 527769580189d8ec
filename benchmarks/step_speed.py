"""Real tokens a second, and MFU, of whole training steps: ours, ours with DeepSpeed's experts, a dense model as active, and others.

On a CPU all are started and take turns. Of a GPU's memory each needs most, so there they come one after the other.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import train_ours
import train_peers
from measure import Row, Timing
from moe_speed import ceilings
from ranks import Ranks
from train_models import LENGTH, TINY, TOP_K, dense_config, recipe, write_deepspeed, write_fused, write_records
from train_peers import EAGER, GROUPED, PADDED, PUBLISHED

from h3scale.checkpoint.shards import ModelFolder
from h3scale.train.peak import known_peak

OURS = "h3scale"
DEEPSPEED = "h3scale with DeepSpeed's experts"
DENSE = "h3scale, dense of the same active size"
OTHERS = (GROUPED, EAGER, PADDED, PUBLISHED)
SAME_LOSS = {"cpu": 1e-4, "cuda": 2e-2}  # relative; on a GPU in bf16
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


def step(tiny: bool, work: Path) -> list[Row]:
    """All have the same weights, but for the dense one, and see the same records; the LM loss of the first step says so."""
    on_gpu = torch.cuda.is_available()
    rounds = 1 if tiny else 20 if on_gpu else 7
    sizes = TINY if tiny else LARGE if on_gpu else SMALL
    write_records(work, tiny, rounds + 1)
    write_fused(work / "model", sizes, 1, 0, torch.bfloat16 if on_gpu else torch.float32)
    write_dense(work / "dense", sizes, torch.bfloat16 if on_gpu else torch.float32)
    write_deepspeed(work / "zero.json", 3, bf16=on_gpu)
    contenders = dict(_contenders(work, rounds + 1, on_gpu))
    turns = [{name: one} for name, one in contenders.items()] if on_gpu else [contenders]
    answers: dict[str, list[Row]] = {}
    for together in turns:
        answers |= _take_turns(together, rounds + 1)
    _check({name: found[0]["lm"] for name, found in answers.items() if name != DENSE}, SAME_LOSS["cuda" if on_gpu else "cpu"])
    best = max(row["tflops"] for row in ceilings(tiny, work) if "tflops" in row and ("bf16" in row["what"]) is on_gpu)
    return list(_rows(answers, best))


def _contenders(work: Path, steps: int, on_gpu: bool) -> Iterator[tuple[str, Contender]]:
    trainable = ["all"] if on_gpu else ["experts", "router"]
    plain = recipe(work, work / "model", work / "zero.json", steps, trainable=trainable, drift={"gamma": 0.0})
    ffn = ["all"] if on_gpu else ["ffn"]
    dense = recipe(work, work / "dense", work / "zero.json", steps, trainable=ffn, drift={"gamma": 0.0})
    for name, settings, words in ((OURS, plain, ()), (DEEPSPEED, plain, ("deepspeed",)), (DENSE, dense, ())):
        path = work / f"{len(name)}.json"
        path.write_text(settings.model_dump_json(exclude_unset=True), encoding="utf-8")
        yield name, Contender(partial(Ranks, train_ours.__file__, [str(path), str(work / path.stem), *words]))
    for name in OTHERS:
        words = [str(work), str(steps), name, ",".join(trainable)]
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
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    assert ModelFolder(folder).config["max_position_embeddings"] == LENGTH


def _check(losses: dict[str, float], tolerance: float) -> None:
    first = next(iter(losses.values()))
    if any(abs(loss - first) > tolerance * first for loss in losses.values()):
        raise AssertionError(f"not the same LM loss in the first step: {losses}")


def _rows(answers: dict[str, list[Row]], ceiling_tflops: float) -> Iterator[Row]:
    """Rates are of the fastest round, ratios of tokens a second; the first step does not count."""
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    rates = {name: max(row["tokens"] / row[clock] for row in found[1:]) for name, found in answers.items()}
    for name, (first, *rounds) in answers.items():
        timing = Timing([row["wall_s"] for row in rounds], [row["cpu_s"] for row in rounds])
        row = {"what": name, "first_lm": first["lm"], "tokens_per_s": rates[name], "padding": first.get("padding", "")}
        if "flops" in first:
            tflops = max(row["flops"] / row[clock] for row in rounds) / 1e12
            row |= {"tflops": tflops, "of_matmul": tflops / ceiling_tflops}
            peak = known_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
            if peak:
                row["mfu"] = tflops * 1e12 / peak
        yield {**row, "h3scale_is_faster": rates[OURS] / rates[name], **timing.figures()}
