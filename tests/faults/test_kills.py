"""kill -9 of a rank at any moment, most of them inside a save: the run goes on to the bits of one that nothing happened to."""

import random
from pathlib import Path

import pytest
import torch

from tests.distributed.test_resume import EXPERTS, lines, model, run_all, words
from tests.distributed.test_train import make_world

pytestmark = pytest.mark.distributed

STAGE = "ZeRO-3, EP 2"
KILLS_A_RUN = 3
LONGEST_S = 1.0  # a run of five steps that saves after each takes about as long


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), EXPERTS)


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """An undisturbed run."""
    codes, said = run_all({"x": ("", words(world, STAGE, world / "whole"))})
    assert codes == {"x": [0, 0]}, said
    return world / "whole"


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_at_any_moment_costs_nothing_but_time(world: Path, whole: Path, tmp_path: Path, count: int) -> None:
    """Every second run saves in the background."""
    rng, kills = random.Random(count), 0
    for attempt in range(4 * count):  # a kill may come when the run has ended
        out = tmp_path / f"run-{attempt}"
        line = words(world, STAGE, out, "save.every=1", f"save.background={['false', 'true'][attempt % 2]}")
        moments = [f"kill {rng.randrange(2)} {rng.uniform(0, LONGEST_S):.3f}" for _ in range(KILLS_A_RUN)]
        codes, said = run_all({moment: (moment, line) for moment in moments} | {"at last": ("", line)})
        kills += sum(-9 in code for code in codes.values())
        assert codes["at last"] in ([0, 0], [73, 73]), said  # 73: the kill came after the end, and the output was there
        for code in codes.values():
            assert set(code) <= {0, -9, 69, 73}, said
        assert "damaged" not in said
        assert lines(out) == lines(whole), moments
        expected, found = model(whole, STAGE), model(out, STAGE)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], moments
        if kills >= count and attempt:
            return
    pytest.fail(f"only {kills} kills came in time")
