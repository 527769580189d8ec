"""A real Slurm for the session, and a folder in which jobs are submitted."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.distributed.test_train import EXPERTS, make_world
from tests.slurm.cluster import Cluster, missing_programs, running
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = missing_programs() or ([] if os.geteuid() == 0 else ["root's rights"])
    if missing:
        reason = f"no Slurm here: {', '.join(missing)} missing (works: as root, apt-get install slurm-wlm munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster ends with the session, also when that is ended
    place = Path(tempfile.mkdtemp(prefix="h3s-"))  # a short path: that of a socket ends after a hundred characters
    # nothing that a launcher, or a Slurm around these tests, has left in the environment
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    try:
        with running(place, own | {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])}) as found:
            yield found
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    """Jobs of one test, submitted in its folder; the ones that are left are ended."""
    made = Jobs(cluster, tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny fused model, records and a recipe; trains on two ranks."""
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"ep_size": 2, "tracking": {"tensorboard": False}, "guards": {"dry_run": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
