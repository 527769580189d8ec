"""Law 6 with real processes: the order is the same byte for byte on 1, 2 and 4 ranks, and after being killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h3scale.data.prepare import prepare
from h3scale.launch.local import rank_command, run_ranks
from tests.tiny import tiny_tokenizer
from tests.unit.data.test_prepare import line, recipe, write

pytestmark = pytest.mark.distributed

STEPS = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    path = write(folder / "a.jsonl", [line(i) for i in range(150)])
    return prepare(recipe(path), tiny_tokenizer(), folder / "prepared").folder


def words(store: Path, out: Path) -> list[str]:
    return rank_command("tests.distributed.dump_order", [str(store), str(out), str(STEPS)])


def order(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("step-*.json"))]


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    out = tmp_path_factory.mktemp("one")
    assert run_ranks(words(store, out), 1) == 0
    found = order(out)
    assert len(found) == STEPS
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_and_four_ranks_get_the_order_of_one(store: Path, undisturbed: list[bytes], tmp_path: Path, ranks: int) -> None:
    assert run_ranks(words(store, tmp_path), ranks) == 0
    assert order(tmp_path) == undisturbed


def test_killed_and_gone_on_with_other_ranks_nothing_is_lost_or_repeated(
    store: Path, undisturbed: list[bytes], tmp_path: Path
) -> None:
    code = "import sys; from h3scale.launch.local import run_ranks; sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))"
    for ranks, until in ((1, 9), (2, 22), (1, 35), (4, 47)):
        process = subprocess.Popen([sys.executable, "-c", code, str(ranks), *words(store, tmp_path)], start_new_session=True)
        deadline = time.monotonic() + 120
        while len(order(tmp_path)) < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert until <= len(order(tmp_path)) < STEPS
    assert run_ranks(words(store, tmp_path), 2) == 0
    assert order(tmp_path) == undisturbed
