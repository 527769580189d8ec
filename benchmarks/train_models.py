"""What the training benchmarks train: fused models of any size with random weights, made-up records, recipes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from data_corpus import ALIGNMENTS, made_up_tokenizer, write_made_up
from measure import Row

from h3scale.checkpoint.expected import expected_shapes
from h3scale.checkpoint.shards import TensorSpec, write_model
from h3scale.config.data import Data
from h3scale.config.recipe import TrainRecipe
from h3scale.data.loader import TypedLoader
from h3scale.data.prepare import prepare
from h3scale.model.experts import ExpertMap
from h3scale.model.families import moe_config

SEED = 0
AS_ON_GPU = torch.cuda.is_available() or os.environ.get("BENCHMARK_AS_ON_GPU") == "1"  # its settings, on a CPU to rehearse them
LENGTH = int(os.environ.get("BENCHMARK_ROW_TOKENS", "256"))
ROWS, ROWS_PER_MICRO_BATCH = 8, 4
NUM_RECORDS = 4000
TOP_K = 2
PEAK_TFLOPS = 1.0  # any: MFU is not of interest here, and to measure the peak takes time
MAX_SHARD_BYTES = 500_000_000
SMALL: Row = {  # a model that a CPU trains a step of in a second
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 4000,
    "tie_word_embeddings": True,
}
TINY: Row = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def small(tiny: bool) -> Row:
    """The sizes that steps are timed at."""
    return TINY if tiny else SMALL


def dense_config(sizes: Row) -> Any:
    """The transformers config of the dense Llama that a fused model of these sizes would come from."""
    from transformers import LlamaConfig

    return LlamaConfig(**sizes, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def write_fused(folder: Path, sizes: Row, experts_per_alignment: int, general: int, dtype: torch.dtype = torch.float32) -> int:
    """A Mixtral of random weights in `folder` (made here), a shard at a time; gives its number of parameters."""
    folder.mkdir()
    expert_map = ExpertMap.of(ALIGNMENTS, experts_per_alignment, general)
    config = moe_config(dense_config(sizes).to_dict(), expert_map, TOP_K)
    shapes = expected_shapes(config, folder)
    generator = torch.Generator().manual_seed(SEED)

    def values(name: str) -> torch.Tensor:
        if len(shapes[name]) < 2:
            return torch.ones(shapes[name], dtype=dtype)  # of norms
        return torch.randn(shapes[name], generator=generator).mul_(shapes[name][-1] ** -0.5).to(dtype)

    specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
    write_model(folder, config, specs, values, max_shard_bytes=MAX_SHARD_BYTES)
    return sum(spec.num_bytes // spec.dtype.itemsize for spec in specs)


def write_records(work: Path, tiny: bool, steps: int) -> None:
    """`records.jsonl`, `tokenizer`, and `prepared` with the plan for so many steps."""
    from transformers import AutoTokenizer

    write_made_up(work / "records.jsonl", NUM_RECORDS // 10 if tiny else NUM_RECORDS)
    made_up_tokenizer(work, tiny).rename(work / "tokenizer")
    open_loader(work, steps, AutoTokenizer.from_pretrained(work / "tokenizer"))


def data(work: Path) -> Data:
    return Data(
        records=[str(work / "records.jsonl")],
        prepared=str(work / "prepared"),
        workers=1,
        sequence_length=LENGTH,
        rows_per_batch=ROWS,
    )


def open_loader(work: Path, steps: int, tokenizer: Any) -> TypedLoader:
    """The same batches as a run of h3scale gets."""
    store = prepare(data(work), tokenizer, work / "prepared")
    return TypedLoader(store, data(work), seed=SEED, alignments=list(ALIGNMENTS), steps=steps)


def write_deepspeed(path: Path, stage: int, bf16: bool = False) -> None:
    """A ds_config as ds_configs/cpu_debug.json; on a GPU with DeepSpeed's own defaults."""
    zero: Row = {"stage": stage, "overlap_comm": AS_ON_GPU}
    if stage == 3 and not AS_ON_GPU:
        zero["stage3_param_persistence_threshold"] = 0
    values: Row = {"zero_optimization": zero, "steps_per_print": 10**9}
    if bf16:
        values |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    path.write_text(json.dumps(values), encoding="utf-8")


def recipe(work: Path, model: Path, ds_config: Path, steps: int, **given: Any) -> TrainRecipe:
    """The demo's recipe of a fused model (experts and router trained, LM + router loss + drift) without trackers."""
    return TrainRecipe.model_validate(
        {
            "model": str(model),
            "tokenizer": str(work / "tokenizer"),
            "out": str(work / "out"),
            "seed": SEED,
            "data": data(work),
            "steps": steps,
            "rows_per_micro_batch": ROWS_PER_MICRO_BATCH,
            "trainable": ["experts", "router"],
            "optimizer": {"learning_rate": 1e-3},
            "drift": {"gamma": 0.1},
            "tracking": {"tensorboard": False, "live": False, "peak_tflops": PEAK_TFLOPS},
            "deepspeed": str(ds_config),
            **given,
        }
    )
