"""Saved after any step, gone on with on any ranks and ep_size, any number of times: the same records, the same losses."""

import json
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.distributed.test_guards import started
from tests.distributed.test_resume import EXPERTS, STEPS, lines, words
from tests.distributed.test_train import make_world

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGE = "ZeRO-3, EP 2"
NUMBERS = count()
TOPOLOGIES = [(ranks, ep_size) for ranks in (1, 2, 4) for ep_size in (1, 2, 4) if ranks % ep_size == 0]
Leg = tuple[int, tuple[int, int]]  # after how many steps it is interrupted, and where it is
LEGS = st.lists(
    st.tuples(st.integers(1, STEPS - 1), st.sampled_from(TOPOLOGIES)), min_size=1, max_size=3, unique_by=lambda leg: leg[0]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    run(folder, "whole", [], (2, 2))
    return folder


def run(world: Path, name: str, legs: list[Leg], last: tuple[int, int]) -> None:
    asked = {}
    for stop, (ranks, ep_size) in [*sorted(legs), (STEPS, last)]:
        line = words(world, STAGE, world / name, f"ep_size={ep_size}")
        poison = f"SIGTERM {stop}" if stop < STEPS else ""
        asked[f"to {stop}"] = {"ranks": ranks, "poison": poison, "words": line, "ids": str(world / f"{name}.ids")}
    done = started(asked)
    codes = json.loads(done.stdout.splitlines()[-1])
    wanted = {name: [75 if one["poison"] else 0] * one["ranks"] for name, one in asked.items()}
    assert codes == wanted, done.stderr


@given(legs=LEGS, last=st.sampled_from(TOPOLOGIES))
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_saved_after_any_step_and_gone_on_with_anywhere_a_run_sees_the_same_records_and_has_the_same_losses(
    world: Path, legs: list[Leg], last: tuple[int, int]
) -> None:
    name = f"run-{next(NUMBERS)}"  # not drawn: a failure that is run again, or made smaller, is another run
    run(world, name, legs, last)
    assert (world / f"{name}.ids").read_text() == (world / "whole.ids").read_text()
    for wanted, got in zip(lines(world / "whole"), lines(world / name), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
