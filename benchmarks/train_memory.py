"""Memory of each rank while a fused model starts, beside what it holds when it has started.

The ranks are processes of their own (`python benchmarks/train_memory.py WAY RECIPE.json`): first they import, then they start.
The peers are the same h3scale.train.engine.start with another way to make the model in it.
"""

import gc
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Row
from ranks import Peaks, Ranks, serve
from train_models import TINY, recipe, write_deepspeed, write_fused

from h3scale.config.recipe import TrainRecipe

STREAMED, ZERO_INIT, WHOLE = "h3scale", "from_pretrained under zero.Init", "the whole model on every rank"
VOCAB = 32_000
SIZES: dict[str, Row] = {
    name: {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    for name, hidden, intermediate, layers in (
        ("0.04 B", 256, 1024, 8),
        ("0.13 B", 512, 1792, 8),
        ("0.37 B", 768, 2688, 12),
        ("1.1 B", 1280, 4480, 14),
    )
}
WITH_EXPERTS = "0.13 B"  # the size at which experts are trained as well: masters, Adam and gradients are 14 bytes a parameter
PEER_RANKS = 2
GENERAL = 1  # one expert for each of three alignments and this one: 1, 2 and 4 ranks divide them


def start_memory(tiny: bool, work: Path) -> list[Row]:
    """Peaks at four sizes on 1, 2 and 4 ranks; the peers on two."""
    from data_corpus import made_up_tokenizer

    made_up_tokenizer(work, True).rename(work / "tokenizer")
    write_deepspeed(work / "bf16.json", 3, bf16=True)
    rows: list[Row] = []
    for size, sizes in {"tiny": TINY}.items() if tiny else SIZES.items():
        model = work / "model"
        num_parameters = write_fused(model, sizes, 1, GENERAL, torch.bfloat16)
        cases = [(STREAMED, ranks, ["router"]) for ranks in ((2,) if tiny else (1, 2, 4))]
        cases += [(way, 1 if tiny else PEER_RANKS, ["router"]) for way in (ZERO_INIT, WHOLE)]
        if size == WITH_EXPERTS:
            cases += [(way, PEER_RANKS, ["experts", "router"]) for way in (STREAMED, ZERO_INIT, WHOLE)]
        for way, ranks, trained in cases:
            found = _measure(work, model, way, ranks, trained)
            about = {"what": way, "parameters": num_parameters, "ranks": ranks, "ep_size": ranks, "trained": "+".join(trained)}
            rows.append({**about, **found})
        shutil.rmtree(model)
    return rows


def _measure(work: Path, model: Path, way: str, num_ranks: int, trained: list[str]) -> Row:
    """Of the rank that needs most, MiB above what it held after its imports.

    A unit is the experts of one layer that a rank has before they are cut, or its largest shard where that is larger.
    """
    path = work / "memory.json"
    rows = {"rows_per_micro_batch": 1, "trainable": trained, "ep_size": num_ranks}
    path.write_text(recipe(work, model, work / "bf16.json", 1, **rows).model_dump_json(exclude_unset=True), encoding="utf-8")
    with Ranks(__file__, [way, str(path)], num_ranks) as ranks:
        ranks.ask("import")
        before = ranks.memory_mib()
        with Peaks(ranks) as peaks:
            said = ranks.ask("start")
        ranks.ask("collect")
        held = [now - first for now, first in zip(ranks.memory_mib(), before, strict=True)]
    # what is held is a sample too: the others come every few milliseconds
    peak = [max(most - first, now) for most, first, now in zip(peaks.mib, before, held, strict=True)]
    worst = max(range(num_ranks), key=lambda rank: peak[rank])
    unit = max(said[worst]["layer_experts_mib"], said[worst]["largest_shard_mib"])
    return {
        **said[worst],
        "before_mib": before[worst],
        "held_mib": held[worst],
        "peak_mib": peak[worst],
        "above_held_mib": peak[worst] - held[worst],
        "above_held_in_units": (peak[worst] - held[worst]) / unit,
    }


def rank(way: str, path: Path) -> None:
    run: Any = None

    def answer(question: str) -> Row:
        nonlocal run
        if question == "import":
            _import()
        elif question == "start":
            began = time.perf_counter()
            run = _start(way, TrainRecipe.model_validate_json(path.read_text(encoding="utf-8")))
            return {"seconds": time.perf_counter() - began, **_sizes(run)}
        else:
            gc.collect()
            _return_freed_memory()
        return {}

    serve(answer)


def _import() -> None:
    import deepspeed.module_inject.auto_ep_layer  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    from h3scale.train import engine  # noqa: F401


def _start(way: str, settings: TrainRecipe) -> Any:
    from h3scale.train import engine

    if way == STREAMED:
        return engine.start(settings, "benchmark")
    make = {ZERO_INIT: _under_zero_init, WHOLE: _whole}[way]
    with patch.multiple(engine, empty_model=make, fill=lambda *_: None, freed_memory_returned=nullcontext):
        return engine.start(settings, "benchmark")


def _under_zero_init(folder: Path, ds_config: Row) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig(ds_config)  # from_pretrained looks for a live one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    del kept
    return model


def _whole(folder: Path, _: Row) -> Any:
    from h3scale.model.start import load_model

    return load_model(folder, torch.bfloat16)


def _sizes(run: Any) -> Row:
    """Of this rank: shards of the weights, the largest of them, fp32 masters, Adam's state, one layer's experts of its EP rank."""
    from h3scale.model.trainable import group_of, whole_shape

    named = list(run.engine.module.named_parameters())
    layer = [p for name, p in named if group_of(name) == "experts" and ".layers.0." in name]
    masters = run.engine.optimizer.fp32_partitioned_groups_flat
    state = [tensor for group in run.engine.optimizer.optimizer.state.values() for tensor in group.values()]
    mib = 2**20
    return {
        "shard_mib": sum(p.ds_tensor.nbytes for _, p in named) / mib,
        "largest_shard_mib": max(p.ds_tensor.nbytes for _, p in named) / mib,
        "masters_mib": sum(tensor.nbytes for tensor in masters) / mib,
        "adam_mib": sum(tensor.nbytes for tensor in state) / mib,
        "layer_experts_mib": sum(torch.Size(whole_shape(p)).numel() * p.element_size() for p in layer) / mib,
    }


def _return_freed_memory() -> None:
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim:
        trim(0)


if __name__ == "__main__":
    rank(sys.argv[1], Path(sys.argv[2]))
