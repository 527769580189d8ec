"""Runs that cannot have their output: it is another run's, somebody has made it, or there is no room. All ranks end alike."""

import json
from pathlib import Path

import pytest

from h3scale.train.claim import Claim
from tests.distributed.run_with_poison import BAD_STEP
from tests.distributed.test_guards import started
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = pytest.mark.distributed

RANKS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs' folders, codes.json and stderr.txt. While they go on, the output of `claimed` is this process's."""
    world = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    words = [str(world / "recipe.yaml"), "ep_size=2", f"steps={BAD_STEP}"]
    asked = {name: {"ranks": RANKS, "poison": name, "words": [*words, f"out={world / name}"]} for name in ("claimed", "in the way")}
    with Claim(world / "claimed") as claim:
        claim.take()
        done = started(asked)
    (world / "codes.json").write_text(done.stdout.splitlines()[-1])
    (world / "stderr.txt").write_text(done.stderr)
    return world


def errors(runs: Path, out: Path) -> list[str]:
    return [line for line in (runs / "stderr.txt").read_text().splitlines() if line.startswith(f"error: {out}: ")]


def test_all_ranks_end_alike(runs: Path) -> None:
    assert json.loads((runs / "codes.json").read_text()) == {"claimed": [73] * RANKS, "in the way": [73] * RANKS}
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
