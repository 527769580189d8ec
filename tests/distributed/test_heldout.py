"""Held-out records scored during training, against one process with plain transformers; and the best model, which is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from h3scale.checkpoint.consolidate import consolidate
from h3scale.config.data import Source
from h3scale.data.encode import encode_records
from h3scale.data.sources import read_records
from h3scale.model.experts import ExpertMap
from h3scale.model.start import load_tokenizer
from tests.distributed.test_train import make_world, write_records
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "harmless", "harmless", None, "honest", "honest", None, "helpful")
ALIGNMENTS = ("helpful", "harmless", "honest")
PROMPT_WEIGHT = 0.25
LAUNCHES = {
    "one rank": (1, ["ep_size=1"]),
    "2 ranks, EP 1": (2, ["ep_size=1"]),
    "2 ranks, EP 2": (2, ["ep_size=2", "rows_per_micro_batch=2"]),
    "4 ranks, EP 2": (4, ["ep_size=2"]),
}
SCORED = ["steps=1", f"data.prompt_weight={PROMPT_WEIGHT}", "router.vote=response"]
WILD = ["optimizer.learning_rate=1.0", "optimizer.warmup_share=0"]  # worse after each step
CALM = ["optimizer.learning_rate=0.001"]
DENSE = ["model=DENSE", "trainable=[all]", "deepspeed=ds_configs/cpu_dense.json"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    tiny_llama(folder / "dense")
    write_records(folder / "all.jsonl", ALIGNMENTS)
    records = (folder / "all.jsonl").read_text().splitlines()
    (folder / "heldout.jsonl").write_text("\n".join(records[:20]) + "\n")  # of unequal numbers, in a row count that nothing divides
    evaluation = f"evaluation={{records: [{folder / 'heldout.jsonl'}], every: 1, at_start: true, keep_best: KEEP}}"
    asked: dict[str, Any] = {name: (ranks, [*SCORED, *words], False) for name, (ranks, words) in LAUNCHES.items()}
    asked |= {
        "experts, worse": (2, ["ep_size=2", "steps=2", "trainable=[all]", *WILD], True),
        "experts, better": (2, ["ep_size=2", "steps=2", *CALM], True),
        "dense, worse": (1, ["steps=2", *DENSE, *WILD], True),
        "dense, better": (1, ["steps=2", *DENSE, *CALM], True),
    }
    runs = {}
    for name, (ranks, words, keep) in asked.items():
        words = [f"out={folder / name}", evaluation.replace("KEEP", str(keep).lower()), *words]
        words = [str(folder / "recipe.yaml"), *(word.replace("DENSE", str(folder / "dense")) for word in words)]
        runs[name] = {"ranks": ranks, "poison": "", "words": words}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.run_with_poison", json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def scored(folder: Path) -> list[dict[str, float]]:
    """The lines of held-out figures, without how long they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "heldout/lm" in line]
    assert all(line.pop("heldout/seconds") > 0 for line in found)
    return found


@torch.no_grad()
def reference(model_folder: Path, records: Path) -> dict[str, float]:
    """Record by record, unpacked: weighted NLL per target token, and the share of response tokens on the right experts."""
    tokenizer = load_tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    experts = ExpertMap.from_config(model.config)
    if experts:
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    nll, targets, right, votes = ({a: 0.0 for a in ALIGNMENTS} for _ in range(4))
    for item in encode_records(tokenizer, read_records([Source(path=str(records))])):
        ids, a, prompt = torch.tensor(item.input_ids), item.record.alignment, item.num_prompt_tokens
        output = model(input_ids=ids[None], use_cache=False, **({"output_router_logits": True} if experts else {}))
        losses = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")
        weights = torch.where(torch.arange(1, len(ids)) >= prompt, 1.0, PROMPT_WEIGHT if experts else 0.0)
        nll[a] += float((weights * losses).sum())
        targets[a] += float(weights.sum())
        if experts:
            labelled = torch.tensor(experts.labelled)
            favour = torch.zeros(len(ids), len(ALIGNMENTS), dtype=torch.float64)
            for logits in output.router_logits:
                rest = logits[:, labelled].logsumexp(-1, keepdim=True)
                own = [logits[:, experts.experts_of(name)].logsumexp(-1, keepdim=True) for name in experts.alignments]
                favour += torch.cat(own, -1) - rest
            hits = favour[prompt:].argmax(-1) == experts.alignments.index(a)
            right[a], votes[a] = right[a] + int(hits.sum()), votes[a] + len(hits)
    found = {f"heldout/lm/{a}": nll[a] / targets[a] for a in ALIGNMENTS}
    found["heldout/lm"] = sum(found.values()) / len(ALIGNMENTS)
    return found | ({f"heldout/router_accuracy/{a}": right[a] / votes[a] for a in ALIGNMENTS} if experts else {})


@pytest.mark.parametrize("launch", LAUNCHES)
def test_held_out_figures_are_those_of_one_process_on_every_topology(world: Path, launch: str) -> None:
    first, last = scored(world / launch)
    assert (first.pop("step"), last.pop("step")) == (0, 1)
    wanted = reference(world / "moe", world / "heldout.jsonl")
    assert first == pytest.approx(wanted, rel=1e-5)
    assert len({first[f"heldout/lm/{a}"] for a in ALIGNMENTS}) == len(ALIGNMENTS)
    consolidate(world / launch, world / f"{launch} model")
    assert last == pytest.approx(reference(world / f"{launch} model", world / "heldout.jsonl"), rel=1e-5)
    assert last["heldout/lm"] != pytest.approx(first["heldout/lm"], rel=1e-4)


def test_the_best_step_is_what_is_left_and_the_last_is_beside_it(world: Path) -> None:
    out = world / "experts, worse"
    values = [line["heldout/lm"] for line in scored(out)]
    assert min(values) == values[0], "the run was to get worse"
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000000", "step-000002"]
    manifests = [json.loads((out / step / "manifest.json").read_text()) for step in ("step-000000", "step-000002")]
    assert [manifest["best"] for manifest in manifests] == [True, False]
    assert manifests[0]["heldout_nll"] == values[0]
    consolidate(out, world / "best")
    figures = reference(world / "best", world / "heldout.jsonl")
    consolidate(out / "step-000002", world / "worse")
    worse = reference(world / "worse", world / "heldout.jsonl")
    assert worse["heldout/lm"] > figures["heldout/lm"] + 1e-3
    assert f"result: {out / 'step-000000'}\n" in (world / "stdout.txt").read_text()
    assert f"kept: step 0, held-out lm {values[0]:.4f}; the last step, 2, is beside it" in (world / "stderr.txt").read_text()


def test_a_better_step_takes_the_place_of_the_one_before(world: Path) -> None:
    out = world / "experts, better"
    values = [line["heldout/lm"] for line in scored(out)]
    assert values == sorted(values, reverse=True), "the run was to get better"
    (kept,) = out.glob("step-*")
    assert kept.name == "step-000002"
    assert json.loads((kept / "manifest.json").read_text())["heldout_nll"] == values[-1]


@pytest.mark.parametrize("course", ["worse", "better"])
def test_a_model_folder_is_that_of_the_best_step(world: Path, course: str) -> None:
    out = world / f"dense, {course}"
    values = [line["heldout/lm"] for line in scored(out)]
    assert reference(out, world / "heldout.jsonl")["heldout/lm"] == pytest.approx(min(values), rel=1e-5)
    assert values.index(min(values)) == (0 if course == "worse" else 2)
    facts = json.loads((out / "run.json").read_text())
    assert {name: facts[name] for name in ("ended", "step", "steps")} == {
        "ended": "done", "step": values.index(min(values)), "steps": 2,
    }  # fmt: skip
    assert (out / "last").exists() == (course == "worse")
    if course == "worse":
        assert reference(out / "last", world / "heldout.jsonl")["heldout/lm"] == pytest.approx(values[-1], rel=1e-5)
    assert not list(out.glob("step-*"))
    assert not list(world.glob(".run-*"))


def test_prompts_that_are_trained_on_are_said(world: Path) -> None:
    trained = {json.loads(line)["prompt"] for line in (world / "records.jsonl").read_text().splitlines()}
    held_out = [json.loads(line)["prompt"] for line in (world / "heldout.jsonl").read_text().splitlines()]
    seen = [line for line, prompt in enumerate(held_out, start=1) if prompt in trained]
    assert seen
    said = f"evaluation.records: {len(seen)} of {len(held_out)} held-out prompts are trained on, such as {world / 'heldout.jsonl'}:"
    assert said in (world / "stderr.txt").read_text()
