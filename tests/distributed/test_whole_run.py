"""A whole training run against a plain one: transformers, autograd and torch's AdamW in a single process, twenty steps.

All that an engine does must come out right at once: order of records, accumulation, all losses, clipping, weight decay,
schedule, sharding, expert parallelism, saving and consolidation. Its losses are kept in
tests/golden: what changes them changes results.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from h3scale.checkpoint.consolidate import consolidate
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import PADDING, collate
from h3scale.data.encode import encode_records
from h3scale.data.loader import TypedLoader
from h3scale.data.sources import read_records
from h3scale.data.store import Tokens
from h3scale.launch.local import rank_command, run_ranks
from h3scale.model.experts import ExpertMap
from h3scale.model.families import MOE_FAMILIES
from tests.conftest import ROOT
from tests.tiny import tiny_records, tiny_tokenizer

pytestmark = pytest.mark.distributed

ALIGNMENTS = ("helpful", "harmless", "honest")
EXPERTS = ExpertMap(ALIGNMENTS, (*ALIGNMENTS, None))
STEPS, CLIP, DECAY, PEAK, WARMUP, FINAL = 20, 1.0, 0.1, 2e-3, 4, 0.1
ROUTER_WEIGHT, Z_WEIGHT, GAMMA = 0.5, 0.01, 2.0
BETAS, EPS = (0.9, 0.95), 1e-8
EXPERTS_KEY = {family: MOE_FAMILIES[family].experts_key for family in ("mixtral", "qwen3_moe")}  # that other tools read
TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, ep_size
QUICK = [(2, 2)]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=48, intermediate_size=48, num_experts=4, head_dim=16, norm_topk_prob=True
    ),
}


def make_model(folder: Path, family: str) -> Path:
    tokenizer = tiny_tokenizer(folder)
    config = CONFIGS[family]
    config.vocab_size, config.h3scale = len(tokenizer), EXPERTS.to_config()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    records = tiny_records(folder / "records.jsonl", ALIGNMENTS, per_alignment=30)
    recipe = {
        "model": "",
        "out": "",
        "data": {
            "records": [str(records)],
            "sequence_length": 32,
            "rows_per_batch": 8,
            "hygiene": {"exact_duplicates": False, "near_duplicates": None},
        },
        "steps": STEPS,
        "trainable": ["all"],
        "optimizer": {
            "learning_rate": PEAK,
            "betas": BETAS,
            "weight_decay": DECAY,
            "warmup_share": WARMUP / STEPS,
            "final_share": FINAL,
            "clip_norm": CLIP,
        },
        "router": {"loss_weight": ROUTER_WEIGHT, "z_weight": Z_WEIGHT},
        "drift": {"gamma": GAMMA},
        "tracking": {"tensorboard": False, "peak_tflops": 1.0},
        "deepspeed": "",
    }
    for stage in (2, 3):
        settings = {"zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    for family in CONFIGS:
        make_model(folder / family, family)
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(recipe | {"model": str(folder / family)}))
    return folder


def run(world: Path, family: str, stage: int, ranks: int, ep_size: int) -> Path:
    """The folder that h3scale leaves behind."""
    place = world / f"{family}-zero{stage}-{ranks}-ranks-ep-{ep_size}"
    words = [f"out={place}", f"deepspeed={world / f'zero{stage}.json'}", f"ep_size={ep_size}"]
    words += [f"rows_per_micro_batch={1 if ranks == 4 else 2}"]
    assert run_ranks(rank_command("h3scale.train", [str(world / f"{family}.yaml"), *words]), ranks) == 0
    return place


def rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))


class PlainRun:
    """The same run without any of h3scale's training code; only records, packing and order are the loader's."""

    def __init__(self, world: Path, family: str):
        recipe = load_recipe(TrainRecipe, world / f"{family}.yaml", ["out=x", "deepspeed=x"])
        tokenizer = tiny_tokenizer()
        tokens = Tokens.of(encode_records(tokenizer, read_records(recipe.data.records)), ALIGNMENTS)
        loader = TypedLoader(tokens, recipe.data, seed=recipe.seed, steps=STEPS)
        self.batches = [
            collate(loader.batch(step).rows, tokens, recipe.data.sequence_length, tokenizer.pad_token_id) for step in range(STEPS)
        ]
        self.model = AutoModelForCausalLM.from_pretrained(world / family, dtype=torch.float32)
        self.model.set_experts_implementation("eager")
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".experts." in n}
        router = [p for n, p in self.model.named_parameters() if ".gate.weight" in n]
        matrices = [p for n, p in self.model.named_parameters() if p.ndim > 1 and ".gate.weight" not in n]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": [*router, *vectors], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)

    def step(self, step: int) -> dict[str, float]:
        batch = self.batches[step]
        output = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_router_logits=True)
        labels, voting = batch.alignment_ids.flatten(), batch.roles.flatten() != PADDING
        target = batch.targets.flatten() >= 0
        logs = [logits[voting] for logits in output.router_logits]
        terms = {
            "lm": F.cross_entropy(output.logits.flatten(0, 1)[target], batch.targets.flatten()[target]),
            "router": torch.stack([F.cross_entropy(logits[:, :3], labels[voting]) for logits in logs]).mean(),
            "router_z": torch.stack([logits.logsumexp(-1).square().mean() for logits in logs]).mean(),
            "drift": self.drift(),
        }
        total = terms["lm"] + ROUTER_WEIGHT * terms["router"] + Z_WEIGHT * terms["router_z"] + terms["drift"]
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(step)
        self.optimizer.step()
        return {name: term.item() for name, term in terms.items()} | {"grad_norm": norm.item()}

    def drift(self) -> torch.Tensor:
        total = torch.zeros(())
        named, layers = dict(self.model.named_parameters()), self.model.config.num_hidden_layers
        for layer in range(layers):
            names = [f"model.layers.{layer}.mlp.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")]
            gap = sum((named[n] - self.start[n]).square().sum((1, 2)) for n in names)
            size = sum(self.start[n].square().sum((1, 2)) for n in names)
            total = total + GAMMA / layers * (gap / size).sum()
        return total


@pytest.fixture(scope="module")
def plain(world: Path) -> dict[str, tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """Losses of every step, and the weights at the end under their published names."""
    found = {}
    for family in CONFIGS:
        run = PlainRun(world, family)
        losses = [run.step(step) for step in range(STEPS)]
        run.model.save_pretrained(world / f"{family}-plain")
        found[family] = losses, load_file(world / f"{family}-plain" / "model.safetensors")
    return found


CASES = [
    pytest.param(family, stage, topology, marks=[] if topology in QUICK else pytest.mark.slow)
    for family in CONFIGS
    for stage in (2, 3)
    for topology in TOPOLOGIES
]


@pytest.mark.parametrize(("family", "stage", "topology"), CASES)
def test_losses_and_final_weights_are_those_of_a_plain_run(
    world: Path, tmp_path: Path, plain, family: str, stage: int, topology: tuple[int, int]
) -> None:
    losses, weights = plain[family]
    place = run(world, family, stage, *topology)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    golden = json.loads((ROOT / "tests" / "golden" / f"losses_{family}.json").read_text())
    for line, expected, kept in zip(lines, losses, golden, strict=True):
        assert {name: line[name] for name in kept} == pytest.approx(kept, rel=1e-3, abs=1e-6), line["step"]
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=5e-5, abs=1e-6), (line["step"], name)
    if stage == 3:
        consolidate(place, tmp_path / "model")
        place = tmp_path / "model"
    assert EXPERTS_KEY[family] in json.loads((place / "config.json").read_text())
    found = load_file(place / "model.safetensors")
    assert found.keys() == weights.keys()
    moved = load_file(world / family / "model.safetensors")
    for name, expected in weights.items():
        way = (expected - moved[name]).abs().max()
        assert way > 1e-3, f"{name} has not moved, so that nothing is shown"
        assert (found[name] - expected).abs().max() < 1e-3 * way, name


@pytest.mark.parametrize("family", CONFIGS)
def test_the_losses_are_those_of_the_golden_run(plain, family: str) -> None:
    golden = json.loads((ROOT / "tests" / "golden" / f"losses_{family}.json").read_text())
    for step, (found, expected) in enumerate(zip(plain[family][0], golden, strict=True)):
        assert found == pytest.approx(expected, rel=1e-3), step
