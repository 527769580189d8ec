"""Runs that cannot have their output: it is another run's, somebody has made it, or there is no room. All ranks end alike."""

import json
import re
from pathlib import Path

import pytest
import torch

from h3scale.checkpoint.shards import ModelFolder
from h3scale.exit_status import kept_step, read_exit_status
from h3scale.train.claim import Claim
from tests.distributed.run_with_poison import BAD_STEP
from tests.distributed.test_guards import inside, started
from tests.distributed.test_train import EXPERTS, make_world
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

RANKS = 2
DENSE = "full disk, dense"
BACKGROUND = "one full disk, in the background"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs' folders, codes.json and stderr.txt. While they go on, the output of `claimed` is this process's."""
    world = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    words = [str(world / "recipe.yaml"), "ep_size=2", f"steps={BAD_STEP}"]
    names = ("claimed", "in the way", "full disk")
    asked = {name: {"ranks": RANKS, "poison": name, "words": [*words, f"out={world / name}"]} for name in names}
    dense = [words[0], f"steps={BAD_STEP}", "trainable=[all]", "deepspeed=ds_configs/cpu_dense.json", f"out={world / DENSE}"]
    asked[DENSE] = {"ranks": 1, "poison": "full disk", "words": [*dense, f"model={tiny_llama(world / 'dense')}"]}
    for policy in ("stop", "go_on"):
        more = [f"save={{every: 1, on_error: {policy}}}", f"steps={BAD_STEP + 1}", f"out={world / policy}"]
        asked[policy] = {"ranks": RANKS, "poison": "one full disk", "words": [*words, *more]}
    more = ["save={every: 1, background: true}", f"steps={BAD_STEP + 2}", f"out={world / BACKGROUND}"]
    asked[BACKGROUND] = {"ranks": RANKS, "poison": "one full disk for ever", "words": [*words, *more]}
    with Claim(world / "claimed") as claim:
        claim.take()
        done = started(asked)
    (world / "codes.json").write_text(done.stdout.splitlines()[-1])
    (world / "stderr.txt").write_text(done.stderr)
    return world


def errors(runs: Path, out: Path) -> list[str]:
    return [line for line in (runs / "stderr.txt").read_text().splitlines() if line.startswith(f"error: {out}: ")]


def test_all_ranks_end_alike(runs: Path) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    assert codes == {
        "claimed": [73] * RANKS,
        "in the way": [73] * RANKS,
        "full disk": [74] * RANKS,
        DENSE: [74],
        "stop": [74] * RANKS,
        "go_on": [0] * RANKS,
        BACKGROUND: [74] * RANKS,
    }
    assert "Traceback" not in (runs / "stderr.txt").read_text()


def test_a_run_whose_output_another_run_is_writing_does_not_begin(runs: Path) -> None:
    assert [": a run is writing it (process " in line for line in errors(runs, runs / "claimed")] == [True] * RANKS
    assert not (runs / ".run-claimed").exists()


def test_what_was_made_during_the_run_stays_and_the_model_is_kept_beside_it(runs: Path) -> None:
    out, left = runs / "in the way", runs / ".run-in the way"
    said = errors(runs, out)
    assert [f"what the run leaves is in {left} " in line for line in said] == [True] * RANKS
    assert (out / "precious.txt").read_text() == "mine"
    manifest = json.loads((left / f"step-{BAD_STEP:06d}" / "manifest.json").read_text())
    assert all((left / f"step-{BAD_STEP:06d}" / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())
    assert not list(runs.glob(".run-*.lock*"))


@pytest.mark.parametrize("run", ["full disk", DENSE])
def test_a_full_disk_at_the_end_of_a_run_is_one_line_and_leaves_nothing_that_looks_complete(runs: Path, run: str) -> None:
    said = [line for line in (runs / "stderr.txt").read_text().splitlines() if f"{runs / f'.run-{run}'}" in line]
    assert said
    assert all(line.startswith("error: ") and ": cannot be written: " in line and " GB are free)" in line for line in said)
    assert not (runs / run).exists()
    assert kept_step(runs / run) == 0
    assert len((runs / f".run-{run}" / "metrics.jsonl").read_text().splitlines()) == BAD_STEP


def test_a_checkpoint_that_one_ranks_disk_refuses_ends_the_run_or_not_by_recipe_and_the_one_before_stays(runs: Path) -> None:
    said = (runs / "stderr.txt").read_text().splitlines()
    stopped, went_on = ([line for line in said if f"{runs / f'.run-{policy}'}/.partial-" in line] for policy in ("stop", "go_on"))
    assert all(line.startswith("error: ") and line.endswith("(rank 1)") for line in stopped)
    assert len(stopped) == RANKS
    status = read_exit_status(runs / "stop")
    assert status is not None
    assert (status["exit_code"], status["step"]) == (74, BAD_STEP - 1)
    assert kept_step(runs / "stop") == BAD_STEP - 1
    assert not list((runs / ".run-stop").glob(".partial-*"))
    (line,) = went_on
    assert f"step {BAD_STEP} is not saved, and the run goes on (save.on_error): " in line
    assert [path.name for path in (runs / "go_on").glob("step-*")] == [f"step-{BAD_STEP + 1:06d}"]


def test_a_disk_that_refuses_in_the_background_ends_the_run_and_the_checkpoint_before_stays(runs: Path) -> None:
    run_folder = runs / f".run-{BACKGROUND}"
    said = [line for line in (runs / "stderr.txt").read_text().splitlines() if f"{run_folder}/.partial-" in line]
    assert len(said) == RANKS
    steps = {re.search(r"/\.partial-step-(\d+)/.*\(rank 1\)$", line)[1] for line in said}  # type: ignore[index]
    (step,) = map(int, steps)
    assert step in (BAD_STEP - 1, BAD_STEP)  # the disk is full from step BAD_STEP on, and the one before may still be being written
    assert kept_step(runs / BACKGROUND) == step - 1
    assert not list(run_folder.glob(".partial-*"))


def test_the_size_of_a_model_is_known_before_it_is_written(runs: Path) -> None:
    left = runs / ".run-in the way"
    written: dict[tuple[str, int], int] = {}
    for path in left.glob("step-*/deepspeed/*_states.pt"):
        for _, values in inside(torch.load(path, weights_only=False), ""):
            storage = values.untyped_storage()
            written[path.name, storage.data_ptr()] = storage.nbytes()
    foretold = json.loads((left / "run.json").read_text())["model_bytes"]
    assert foretold == pytest.approx(sum(written.values()), rel=0.02)  # DeepSpeed pads
    foretold = json.loads((runs / f".run-{DENSE}" / "run.json").read_text())["model_bytes"]
    assert foretold == sum(spec.num_bytes for spec in ModelFolder(runs / "dense").specs.values())
