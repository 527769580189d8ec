"""The figures of two ranks with expert parallelism, against one process with plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import IGNORE, collate
from h3scale.data.encode import encode_records
from h3scale.data.loader import TypedLoader
from h3scale.data.sources import read_records
from h3scale.data.store import Tokens
from h3scale.model.experts import ExpertMap
from h3scale.model.flops import attended_pairs, training_flops
from h3scale.model.router import alignment_log_probs, membership_AE
from h3scale.model.start import load_model, load_tokenizer
from h3scale.train.loss import votes_of
from h3scale.train.metrics import expert_load
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = pytest.mark.distributed

STEPS = 2
OVERRIDES = ["ep_size=2", "router.vote=response", f"steps={STEPS}", "tracking.peak_tflops=0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run of two ranks in `out` of the folder that is given, and what it said."""
    world = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    command = [sys.executable, "-m", "h3scale.cli.main", "train", str(world / "recipe.yaml"), "ranks=2", *OVERRIDES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return world, done


def lines(world: Path) -> list[dict]:
    return [json.loads(line) for line in (world / "out" / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def expected(world: Path) -> dict[str, float]:
    """Routing and losses of the first global batch, counted in one process."""
    recipe = load_recipe(TrainRecipe, world / "recipe.yaml", OVERRIDES)
    tokenizer, model = load_tokenizer(world / "moe"), load_model(world / "moe")
    expert_map = ExpertMap.from_config(model.config)
    assert expert_map
    tokens = Tokens.of(encode_records(tokenizer, read_records(recipe.data.records)), expert_map.alignments)
    loader = TypedLoader(tokens, recipe.data, seed=recipe.seed)
    rows = loader.batch(0).rows
    batch = collate(rows, tokens, recipe.data.sequence_length, tokenizer.pad_token_id)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_router_logits=True)
    labels, voting = batch.alignment_ids.flatten(), votes_of(batch.roles.flatten(), recipe.router.vote)
    logits = torch.stack(output.router_logits)
    chosen = F.one_hot(logits.topk(model.config.num_experts_per_tok, dim=-1).indices, len(EXPERTS)).sum(-2)
    found = expert_load(chosen[:, labels >= 0].sum(1).double(), expert_map.names())
    log_probs = alignment_log_probs(logits, membership_AE(expert_map))
    nll = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    for a, alignment in enumerate(expert_map.alignments):
        mine = voting & (labels == a)
        found[f"router/{alignment}"] = -log_probs.mean(0)[mine, a].mean().item()
        found[f"router_accuracy/{alignment}"] = (log_probs.sum(0)[mine].argmax(-1) == a).double().mean().item()
        found[f"lm/{alignment}"] = nll[(labels == a) & (batch.targets.flatten() != IGNORE)].mean().item()
    found["tokens"] = int((labels >= 0).sum())
    pairs = attended_pairs(loader.kept[loader.batch(0).records])
    found["flops"] = training_flops(model.config, recipe.trainable).of(int(found["tokens"]), pairs)
    return found


def test_routing_and_losses_by_alignment_are_those_of_one_process(run: tuple[Path, object]) -> None:
    world, _ = run
    found, wanted = lines(world)[0], expected(world)
    flops = wanted.pop("flops")
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    ranks, peak = 2, 0.5e12
    assert found["mfu"] == pytest.approx(flops / (found["seconds"] * ranks * peak))


def test_a_line_says_where_the_time_of_a_step_went(run: tuple[Path, object]) -> None:
    world, _ = run
    for line in lines(world):
        phases = {name: line[f"seconds/{name}"] for name in ("data", "forward", "backward", "step")}
        assert all(value > 0 for value in phases.values())
        assert all(value <= line["seconds"] for value in phases.values())
        assert 0 < line["seconds/all_to_all"] <= phases["forward"] + phases["backward"], "DeepSpeed's exchange is not timed"
        assert line["memory_gib"] > 0
        assert line["grad_norm"] > 0


def test_the_runs_own_files_are_kept_and_the_terminal_has_our_words_only(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    world, done = run
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        "exit_status.json", "logs", "metrics.jsonl", "run.json", f"step-{STEPS:06d}", "tensorboard",
    ]  # fmt: skip
    assert [len(list((world / "out" / "tensorboard").iterdir()))] == [1]
    assert sorted(path.name for path in (world / "out" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert json.loads((world / "out" / "run.json").read_text())["peak_source"] == "tracking.peak_tflops"
    log = (world / "out" / "logs" / "rank-0.log").read_text()
    said = [line.removeprefix("[rank 0] ") for line in done.stderr.splitlines()]
    kept = [line.split(" INFO h3scale: ")[1] for line in log.splitlines() if " INFO h3scale: " in line]
    assert said == kept
    assert "MFU is of 500 GFLOP/s (tracking.peak_tflops), ranks: 2" in kept
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["result", "next"]
