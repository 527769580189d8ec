"""What all tests share: quiet libraries, one thread a process, the real 3H data when it is beside the checkout."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers a file stays on one of them, for its fixtures; and all of Slurm on one, for its nodes and ports."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if "slurm" in Path(file).parts else file

    return ByFile(config, log)


@pytest.fixture
def real_data() -> Path:
    """The folder of real 3H records; tests that want it are skipped where it is not there."""
    folder = ROOT.parent / "shared" / "data" / "3h"
    if not folder.is_dir():
        pytest.skip("the real 3H records (../shared/data/3h) are not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets h3scale's logger up, and the next test's caplog would depend on that."""
    logger = logging.getLogger("h3scale")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])
