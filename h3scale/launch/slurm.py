"""The commands that start a recipe on several machines: Slurm's sbatch, or DeepSpeed's launcher with a hostfile."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError, MissingInputError, UsageError

SCRIPT = "train.sh"


@dataclass(frozen=True)
class Size:
    """Ranks of a job: `nodes` machines with `tasks` ranks each. `gpus` of a machine are asked for, if not None."""

    nodes: int
    tasks: int
    gpus: int | None = None


def sized(recipe: str, words: Sequence[str], nodes: int | None, gpus: int | None) -> Size:
    """The size that is asked for; without, one node with the recipe's `ranks`.

    ConfigError (78) when the ranks do not divide the recipe's rows.
    """
    checked = load_recipe(TrainRecipe, recipe, list(words))
    size = Size(nodes or 1, gpus or checked.ranks, gpus)
    rows, micro, ranks = checked.data.rows_per_batch, checked.rows_per_micro_batch, size.nodes * size.tasks
    if rows % (micro * ranks):
        works = ", ".join(str(n) for n in range(1, rows + 1) if rows % (micro * n * size.tasks) == 0)
        raise ConfigError(
            f"{recipe}: {size.nodes} nodes x {size.tasks} ranks x rows_per_micro_batch = {micro} do not divide "
            f"data.rows_per_batch = {rows} (works: {f'--nodes {works}' if works else 'fewer ranks a node'})"
        )
    return size


def sbatch_command(recipe: str, words: Sequence[str], size: Size, options: Sequence[str] = ()) -> list[str]:
    """What a person would type; `options` are more of sbatch's."""
    gpus = [f"--gpus-per-node={size.gpus}"] if size.gpus else []
    shape = [f"--nodes={size.nodes}", f"--ntasks-per-node={size.tasks}", *gpus]
    return ["sbatch", *shape, *options, str(script()), recipe, *words]


def deepspeed_command(recipe: str, words: Sequence[str], size: Size, hostfile: Path | None = None) -> list[str]:
    """The same run by DeepSpeed's launcher: on this machine, or with a hostfile on several, over ssh."""
    where = ["--hostfile", str(hostfile)] if hostfile else ["--num_accelerators", str(size.tasks)]
    return ["deepspeed", *where, "--module", "h3scale.train", recipe, *words]


def hostfile_text(names: Sequence[str], tasks: int) -> str:
    """One line a machine, as DeepSpeed reads it."""
    return "".join(f"{name} slots={tasks}\n" for name in names)


def node_names(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The machines that are named, else those of the Slurm allocation this runs in. UsageError (2) without either."""
    listed = environment.get("SLURM_JOB_NODELIST")
    if given:
        return list(given)
    if listed is None:
        raise UsageError("--hostfile: no machines are known (works: --node NAME for each, or inside a Slurm allocation: salloc)")
    return subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True).stdout.split()


def submit(command: Sequence[str]) -> str:
    """Hands the command to Slurm; what it says."""
    if shutil.which(command[0]) is None:
        raise MissingInputError(f"{command[0]}: not on this machine (works: on a login node of a Slurm cluster; --print elsewhere)")
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UsageError(f"sbatch: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout.strip()


def script() -> Path:
    """slurm/train.sh of the current folder, where people change it, else the one that h3scale came with."""
    own = Path("slurm") / SCRIPT
    package = Path(str(files("h3scale")))
    places = (own, package.parent / own, package / "shipped" / own)
    return next(place for place in places if place.is_file())
