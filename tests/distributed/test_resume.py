"""A run that was interrupted goes on by the same command, to the same bits as one that was not, at every ZeRO stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from h3scale.checkpoint.consolidate import consolidate
from h3scale.exit_status import kept_step, read_exit_status
from tests.distributed.run_with_poison import BAD_STEP
from tests.distributed.test_guards import STAGES as GUARDED
from tests.distributed.test_guards import started
from tests.distributed.test_train import make_world, write_records
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "helpful", "harmless", None, "honest", "honest", "honest", "harmless")
STEPS, EVERY = 5, 2
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
STAGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    **GUARDED,
    "ZeRO-3, bf16, EP 2": (
        ["ep_size=2", "evaluation={records: [RECORDS], every: 1, keep_best: true}"],
        {"zero_optimization": {"stage": 3}, **BF16},
    ),
    "ZeRO-1, EP 2": (["ep_size=2"], {"zero_optimization": {"stage": 1}}),
    "no ZeRO, LoRA": (
        ["model=DENSE", "trainable=[ffn]", "lora={dropout: 0.3}", "evaluation={records: [RECORDS], every: 1, keep_best: true}"],
        {"zero_optimization": {"stage": 0}},
    ),
}
QUICK = ("ZeRO-3, EP 2", "no ZeRO, LoRA")
HOW = {"SIGUSR2": (75, BAD_STEP), "SIGKILL": (None, EVERY)}  # exit code of all ranks, and where it goes on
PARAMS = {name: pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STAGES}
FIGURES = ("lm", "router", "drift", "grad_norm", "router_balance", "lr", "heldout/lm", "tokens_per_expert/helpful", "targets")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    write_records(folder / "heldout.jsonl", ("helpful", "harmless", "honest"))
    tiny_llama(folder / "dense")
    return folder


def words(world: Path, stage: str, out: Path, *more: str) -> list[str]:
    changes, config = STAGES[stage]
    (world / f"{stage}.json").write_text(json.dumps({**config, "steps_per_print": 10**9}))
    changes = [word.replace("DENSE", str(world / "dense")).replace("RECORDS", str(world / "heldout.jsonl")) for word in changes]
    return [str(world / "recipe.yaml"), f"out={out}", f"deepspeed={world / stage}.json", f"steps={STEPS}", *changes, *more]


def run_all(asked: dict[str, tuple[str, list[str]]], ranks: int = 2) -> tuple[dict[str, list[int]], str]:
    """Exit codes by name, and what was said; runs that have the same output one after the other."""
    done = started({name: {"ranks": ranks, "poison": poison, "words": line} for name, (poison, line) in asked.items()})
    return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout


@pytest.fixture(scope="module", params=PARAMS.values())
def stage(request: pytest.FixtureRequest, world: Path) -> str:
    """A stage of which `STAGE/whole` is an undisturbed run, and `STAGE/HOW` are runs that were interrupted."""
    name = str(request.param)
    place = world / name
    asked = {"whole": ("", words(world, name, place / "whole"))}
    for how in HOW:
        asked[how] = (how, words(world, name, place / how, f"save.every={EVERY}"))
    codes, said = run_all(asked)
    assert codes["whole"] == [0, 0], said
    for how, (code, step) in HOW.items():
        assert code is None or codes[how] == [code] * 2, said
        assert kept_step(place / how) == step
        assert not (place / how).exists()
    status = read_exit_status(place / "SIGUSR2")
    assert status is not None
    assert (status["exit_code"], status["reason"], status["step"]) == (75, "SIGUSR2 on rank 1", BAD_STEP)
    codes, said = run_all({how: ("", words(world, name, place / how, f"save.every={EVERY}")) for how in HOW})
    assert codes == {how: [0, 0] for how in HOW}, said
    for how, (_, step) in HOW.items():
        assert f"goes on after step {step} of {STEPS}: {place / f'.run-{how}'}" in said
    return name


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *FIGURES) if name in line} for line in found]


def model(out: Path, stage: str) -> dict[str, torch.Tensor]:
    if "ZeRO-3" in stage:
        target = out.with_name(f"{out.name}-model")
        consolidate(out, target, force=True)
        out = target
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("how", HOW)
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted_bit_for_bit(world: Path, stage: str, how: str) -> None:
    whole, again = world / stage / "whole", world / stage / how
    assert lines(again) == lines(whole)
    expected, found = model(whole, stage), model(again, stage)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert json.loads((again / "run.json").read_text())["resumed_after"] == [HOW[how][1]]
    assert not list((world / stage).glob(".run-*"))
    kept = sorted(path.name for path in again.iterdir())
    assert kept == sorted(path.name for path in whole.iterdir())


@pytest.fixture(scope="module")
def stopped(world: Path) -> Path:
    """A run with three checkpoints, two of them kept; interrupted after step 3, and once more while that is saved."""
    out = world / "stopped"
    codes, said = run_all({"x": ("SIGTERM 3 SIGUSR2", words(world, "ZeRO-3, EP 2", out, "save.every=1"))})
    assert codes == {"x": [75, 75]}, said
    assert said.count("SIGUSR2 in the save") == 2  # on each rank
    assert "stopped: saved after step 3 of 5 (SIGTERM on rank 1): " in said
    return out


@pytest.fixture
def left(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, where `out` would be."""
    shutil.copytree(stopped.with_name(".run-stopped"), tmp_path / ".run-x")
    return tmp_path / "x"


def test_as_many_checkpoints_are_kept_as_the_recipe_says(left: Path) -> None:
    assert sorted(path.parent.name for path in left.with_name(".run-x").glob("*/manifest.json")) == ["step-000002", "step-000003"]


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(world: Path, left: Path) -> None:
    file = next(left.with_name(".run-x").glob("step-000003/deepspeed/*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    whole = left.with_name("whole")
    runs = {name: ("", words(world, "ZeRO-3, EP 2", out, "save.every=1")) for name, out in (("x", left), ("whole", whole))}
    codes, said = run_all(runs)
    assert codes == {"x": [0, 0], "whole": [0, 0]}, said
    assert "sha256 differs from manifest.json" in said
    assert "goes on after step 2 of 5" in said
    assert (left / ".damaged-step-000003").is_dir()
    assert lines(left) == lines(whole)


def test_only_damaged_checkpoints_are_refused_and_left(world: Path, left: Path) -> None:
    for file in left.with_name(".run-x").glob("step-*/ranks/rank-00001.safetensors"):
        file.unlink()
    codes, said = run_all(
        {
            "refused": ("", words(world, "ZeRO-3, EP 2", left)),
            "from scratch": ("", words(world, "ZeRO-3, EP 2", left, "--from-scratch")),
        }
    )
    assert codes == {"refused": [65, 65], "from scratch": [0, 0]}, said
    assert "no checkpoint in it is whole (works: --from-scratch deletes them)" in said
    assert len(lines(left)) == STEPS


CHANGES = {
    "optimizer.learning_rate=0.002": (78, "optimizer.learning_rate: 0.001 -> 0.002"),
    "seed=5": (78, "seed: 0 -> 5"),
    "deepspeed=ZERO2": (78, "was saved with ZeRO stage 3, this run has 2 (works: 3)"),
}


def test_what_has_changed_is_shown_and_goes_on_only_when_it_is_allowed(world: Path, left: Path) -> None:
    base = words(world, "ZeRO-3, EP 2", left)
    zero2 = words(world, "ZeRO-2, EP 2", left)[2].removeprefix("deepspeed=")
    codes, said = run_all({change: ("", [*base, change.replace("ZERO2", zero2)]) for change in CHANGES})
    assert codes == {change: [code] * 2 for change, (code, _) in CHANGES.items()}, said
    for _, message in CHANGES.values():
        assert message in said
    assert kept_step(left) == BAD_STEP
    codes, said = run_all({"x": ("", [*base, "optimizer.learning_rate=0.002", "steps=6", "--allow-change"])})
    assert codes == {"x": [0, 0]}, said
    assert "changed since step-000003: optimizer.learning_rate: 0.001 -> 0.002" in said
    assert [line["step"] for line in lines(left)] == [1, 2, 3, 4, 5, 6]
    assert lines(left)[3]["lr"] > lines(left)[2]["lr"]


@pytest.mark.slow
def test_other_records_at_the_same_place_are_noticed(world: Path, tmp_path: Path) -> None:
    records, out = tmp_path / "records.jsonl", tmp_path / "x"
    shutil.copy(world / "records.jsonl", records)
    line = words(world, "ZeRO-3, EP 2", out, f"data.records=[{records}]")
    codes, said = run_all({"x": ("SIGTERM", line)})
    assert codes == {"x": [75, 75]}, said
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-6]))
    codes, said = run_all({"refused": ("", line), "allowed": ("", [*line, "--allow-change"])})
    assert codes == {"refused": [65, 65], "allowed": [0, 0]}, said
    assert "--allow-change goes on with the new order" in said
    assert "changed since step-000003: the order of the records" in said


def test_files_ask_as_signals_do(world: Path, tmp_path: Path) -> None:
    stop, save = tmp_path / "stop", tmp_path / "save"
    codes, said = run_all(
        {"stop": ("STOP", words(world, "ZeRO-3, EP 2", stop)), "save": ("SAVE", words(world, "ZeRO-3, EP 2", save))}
    )
    assert codes == {"stop": [0, 0], "save": [0, 0]}, said
    status = read_exit_status(stop)
    assert status is not None
    assert (status["exit_code"], status["reason"], status["step"]) == (0, "a file STOP", BAD_STEP)
    assert kept_step(stop) == BAD_STEP
    assert not (tmp_path / ".run-stop" / "STOP").exists()  # else the run would never go on
    assert "saved after step 3: a file SAVE" in said
    status = read_exit_status(save)
    assert status is not None
    assert (status["exit_code"], status["reason"], status["step"]) == (0, "done", STEPS)
    assert sorted(path.name for path in save.glob("step-*")) == [f"step-{STEPS:06d}"]


TOPOLOGIES = {"1 rank": (1, 1), "4 ranks, EP 4": (4, 4), "4 ranks, EP 2": (4, 2), "2 ranks, EP 1": (2, 1)}  # ranks, ep_size
SOME = ("4 ranks, EP 4",)


@pytest.mark.parametrize("there", [pytest.param(t, marks=[] if t in SOME else pytest.mark.slow) for t in TOPOLOGIES])
def test_a_run_goes_on_on_other_ranks_and_back_with_the_same_losses(world: Path, whole: Path, left: Path, there: str) -> None:
    ranks, ep_size = TOPOLOGIES[there]
    line = words(world, "ZeRO-3, EP 2", left, "rows_per_micro_batch=2", f"ep_size={ep_size}")
    codes, said = run_all({"there": ("SIGUSR2 4", line)}, ranks)
    assert codes == {"there": [75] * ranks}, said
    codes, said = run_all({"back": ("", words(world, "ZeRO-3, EP 2", left))})
    assert codes == {"back": [0, 0]}, said
    assert "goes on after step 4 of 5" in said
    assert json.loads((left / "run.json").read_text())["resumed_after"] == [3, 4]
    expected, found = lines(whole), lines(left)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    for wanted, got in zip(expected, found, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    weights, moved = model(whole, "ZeRO-3, EP 2"), model(left, "ZeRO-3, EP 2")
    for name, tensor in weights.items():
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=2e-6, msg=name)  # a thousandth of what a step may move


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """An undisturbed run."""
    out = world / "undisturbed"
    codes, said = run_all({"x": ("", words(world, "ZeRO-3, EP 2", out))})
    assert codes == {"x": [0, 0]}, said
    return out


def test_a_run_without_experts_goes_on_on_more_ranks_and_with_another_stage(world: Path, tmp_path: Path) -> None:
    def line(out: Path, stage: int) -> list[str]:
        (world / f"dense-{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}))
        model = [f"model={world / 'dense'}", "trainable=[ffn, norms]", "rows_per_micro_batch=2"]
        return [str(world / "recipe.yaml"), f"out={out}", f"deepspeed={world / f'dense-{stage}.json'}", f"steps={STEPS}", *model]

    codes, said = run_all({"x": ("", line(tmp_path / "x", 2)), "y": ("SIGTERM", line(tmp_path / "y", 2))})
    assert codes == {"x": [0, 0], "y": [75, 75]}, said
    codes, said = run_all({"y": ("", [*line(tmp_path / "y", 1), "--allow-change"])}, ranks=4)
    assert codes == {"y": [0] * 4}, said
    for wanted, got in zip(lines(tmp_path / "x"), lines(tmp_path / "y"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
