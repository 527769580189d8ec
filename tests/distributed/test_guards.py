"""What guards do under real DeepSpeed, at every ZeRO stage: steps that are not finite, the dry run, evaluation beside training."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.run_with_poison import BAD_STEP
from tests.distributed.test_train import make_world, write_records
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "helpful", "harmless", None, "honest", "honest", "honest", "harmless")
STEPS, LIMIT = 5, 2
RUNS = {  # what happens to a run, and the overrides
    "left out": ("left out", []),
    "loss": ("loss", []),
    "gradient": ("gradient", []),
    "plain": ("", ["guards.dry_run=false"]),
    "watched": ("", ["evaluation={records: [RECORDS], every: 2, at_start: true}"]),
    "left out for ever": ("left out for ever", []),
    "diverged": ("loss for ever", []),
}
STAGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ZeRO-3, EP 2": (
        ["ep_size=2", "router.balance_weight=0.7", "drift.kind=activations"],
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    ),
    "ZeRO-3 with offload, EP 2": (
        ["ep_size=2"], {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    ),
    "ZeRO-2, EP 2": (["ep_size=2"], {"zero_optimization": {"stage": 2}}),
    "ZeRO-1, bf16, dense": (
        ["model=DENSE", "trainable=[all]"],
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "no ZeRO, LoRA": (["model=DENSE", "trainable=[ffn]", "lora={}"], {"zero_optimization": {"stage": 0}}),
}  # fmt: skip
SKIPPING = ("left out", "loss", "gradient")  # all that is done at the stages named next
BRIEF = ("ZeRO-3 with offload, EP 2", "ZeRO-1, bf16, dense")
QUICK = ("ZeRO-3, EP 2", "no ZeRO, LoRA")  # the others are run by make test-all
PARAMS = {name: pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STAGES}
DRAWN = ["lora.dropout=0.3"]  # where there is LoRA, in runs that may draw the same random numbers


@pytest.fixture(scope="module")
def asked_for(request: pytest.FixtureRequest) -> list[str]:
    """The stages that the selected tests look at."""
    return [name for name in STAGES if any(f"[{name}" in item.nodeid for item in request.session.items)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, asked_for: list[str]) -> Path:
    """All runs of the stages that are asked for, in folders STAGE/RUN, and codes.json."""
    world = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    write_records(world / "heldout.jsonl", ("helpful", "harmless", "honest"))
    tiny_llama(world / "dense")
    names = {"DENSE": str(world / "dense"), "RECORDS": str(world / "heldout.jsonl")}
    asked = {}
    for stage in asked_for:
        changes, config = STAGES[stage]
        (world / f"{stage}.json").write_text(json.dumps({**config, "steps_per_print": 10**9}))
        for run in SKIPPING if stage in BRIEF else RUNS:
            poison, more = RUNS[run]
            more = [*more, *(DRAWN if "lora={}" in changes and not poison else [])]
            words = [f"deepspeed={world / stage}.json", f"steps={STEPS}", f"guards.max_skipped_in_a_row={LIMIT}", *changes, *more]
            words = [f"out={world / stage / run}", *(_filled(word, names) for word in words)]
            asked[f"{stage}/{run}"] = {"ranks": 2, "poison": poison, "words": [str(world / "recipe.yaml"), *words]}
    memory = [str(world / "recipe.yaml"), f"out={world / 'memory'}", "ep_size=2", "rows_per_micro_batch=4"]
    asked["memory"] = {"ranks": 2, "poison": "memory", "words": memory}
    done = started(asked)
    (world / "codes.json").write_text(done.stdout.splitlines()[-1])
    (world / "stderr.txt").write_text(done.stderr)
    return world


def _filled(word: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        word = word.replace(name, path)
    return word


def started(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.run_with_poison", json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(params=PARAMS.values())
def any_stage(request: Any, runs: Path) -> Path:
    return runs / request.param


@pytest.fixture(params=[param for name, param in PARAMS.items() if name not in BRIEF])
def stage(request: Any, runs: Path) -> Path:
    return runs / request.param


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run keeps of numbers: weights, and the optimizer's state where it is saved."""
    found = {}
    for path in sorted(folder.rglob("*_states.pt")):
        found |= {f"{path.name}{name}": value for name, value in inside(torch.load(path, weights_only=False), "")}
    for path in sorted(folder.rglob("model.safetensors")):
        found |= load_file(path)
    assert found
    return found


def inside(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from inside(part, f"{name}.{key}")


def assert_same(folder: Path, other: Path) -> None:
    found, wanted = tensors(folder), tensors(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_all_ranks_end_alike(runs: Path, asked_for: list[str]) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    wanted = {"diverged": [76, 76], "memory": [78, 78]}
    assert codes == {name: wanted.get(name.split("/")[-1], [0, 0]) for name in codes}
    assert len(codes) == sum(len(SKIPPING) if stage in BRIEF else len(RUNS) for stage in asked_for) + 1


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_has_no_effect(any_stage: Path, poison: str) -> None:
    assert_same(any_stage / poison, any_stage / "left out")
    after, wanted = lines(any_stage / poison)[BAD_STEP:], lines(any_stage / "left out")[BAD_STEP:]
    figures = ["lm", "router", "router_balance", "drift", "grad_norm", "lr"]
    assert len(after) == STEPS - BAD_STEP
    assert [[line.get(n) for n in figures] for line in after] == [[line.get(n) for n in figures] for line in wanted]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_skipped_step_is_counted_and_its_records_are_named(any_stage: Path, poison: str) -> None:
    found = lines(any_stage / poison)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line.get("skipped") for line in found] == [None] * (BAD_STEP - 1) + [1] + [None] * (STEPS - BAD_STEP)
    assert found[BAD_STEP - 1]["skipped_steps"] == 1
    assert "grad_norm" not in found[BAD_STEP - 1]
    (entry,) = lines(any_stage / poison, "skipped.jsonl")
    assert entry["step"] == BAD_STEP
    assert entry["not_finite"].get("loss") == ([1] if poison == "loss" else None)
    assert entry["not_finite"]["gradient"]
    places = [place.rsplit(":", 1) for place in entry["records"]]
    tokens = found[BAD_STEP - 1]["tokens"]
    sizes = [len(" ".join((r["prompt"], r["response"])).split()) + 3 for r in lines(any_stage.parent, "records.jsonl")]
    assert sum(sizes[int(line) - 1] for _, line in places) == tokens  # two role marks and an end a record
    assert not (any_stage / "left out" / "skipped.jsonl").exists()


def test_the_dry_run_and_the_evaluation_change_no_bit_of_the_training(stage: Path) -> None:
    assert_same(stage / "watched", stage / "plain")
    watched = [line for line in lines(stage / "watched") if "lm" in line]
    assert [line["lm"] for line in watched] == [line["lm"] for line in lines(stage / "plain")]


def test_a_diverged_run_leaves_the_model_before_it_went_wrong_and_says_that_it_is_not_the_end(stage: Path) -> None:
    good = BAD_STEP - 1
    assert [line.get("skipped_steps") for line in lines(stage / "diverged")] == [None] * good + list(range(1, LIMIT + 1))
    (kept,) = (stage / "diverged").glob("step-*")
    assert kept.name == f"step-{good:06d}"
    assert_same(kept, stage / "left out for ever")
    facts = json.loads((stage / "diverged" / "run.json").read_text())
    assert {name: facts[name] for name in ("ended", "step", "steps")} == {"ended": "diverged", "step": good, "steps": STEPS}
    if "ZeRO-3" in stage.name:
        manifest = json.loads((kept / "manifest.json").read_text())
        assert {name: manifest[name] for name in ("ended", "step", "steps")} == {"ended": "diverged", "step": good, "steps": STEPS}
    said = [line for line in (stage.parent / "stderr.txt").read_text().splitlines() if f"{stage.name}/diverged/step" in line]
    assert len(said) == 2  # both ranks; run by h3scale, the second would be ended before it speaks
    assert said[0].startswith(f"error: step {good + LIMIT} of {STEPS}: {LIMIT} steps in a row were not finite; ")
    assert said[0].endswith(
        "(works: a lower optimizer.learning_rate than 0.001, a longer optimizer.warmup_share, or without those records)"
    )


def test_out_of_memory_in_the_dry_run_is_one_line_with_what_to_change(runs: Path) -> None:
    said = [line for line in (runs / "stderr.txt").read_text().splitlines() if "out of memory on rank" in line]
    assert [line.partition(" with ")[0] for line in said] == [f"error: dry run: out of memory on rank {rank}" for rank in (0, 1)]
    assert "with micro-batches of 4 x 48 tokens: " in said[0]
    assert said[0].endswith(
        "works: rows_per_micro_batch: 2, activation_checkpointing: true, a data.sequence_length below 48, more ranks)"
    )
    assert not (runs / "memory").exists()
