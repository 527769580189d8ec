"""The jobs of the whole way, in order: `python -m h3scale.launch.pipeline RECIPES HELDOUT OUT [STEP.key=value ...]`.

slurm/pipeline.sh asks, before it submits anything: one line a job, `name, names it waits for, script, ranks, arguments`, with
tabs between. All recipes are checked here, so that the last one's mistake is not found after the first one's days.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from h3scale.config.base import find, load_recipe
from h3scale.config.deepspeed import read_deepspeed
from h3scale.config.fuse import FuseRecipe
from h3scale.config.recipe import TrainRecipe
from h3scale.config.tiny import TINY
from h3scale.errors import H3Error, MissingInputError, UsageError

USAGE = "usage: slurm/pipeline.sh RECIPES HELDOUT.jsonl OUT [align.key=value ...] [fuse.key=value ...] [train.key=value ...]"
STEPS = ("align", "fuse", "train")  # that have recipes


@dataclass(frozen=True)
class Job:
    """One script with its arguments. `ranks` of a node, 0 for one task. `makes` is what it leaves."""

    name: str
    after: tuple[str, ...]
    script: str
    ranks: int
    words: tuple[str, ...]
    makes: Path


def plan(recipes: Path, heldout: Path, out: Path, words: Sequence[str]) -> list[Job]:
    """The jobs in an order in which they may be submitted; those whose result is there already are left out.

    `recipes` has fuse.yaml, train.yaml, and align_NAME.yaml or align.yaml for each alignment of fuse.yaml. Everything is
    written under `out`, whatever the recipes say.
    """
    own = _by_step(words)
    models = out / "models"
    if not heldout.is_file():
        raise MissingInputError(f"{heldout}: no such file (works: held-out records, JSONL)")
    alignments = load_recipe(FuseRecipe, recipes / "fuse.yaml", own["fuse"]).models
    aligned = [_training(f"align_{name}", (), _align_recipe(recipes, name), own["align"], name, out) for name in alignments]
    jobs = [job for run in aligned for job in run]
    fused = models / "fused_init"
    words_of = (*own["fuse"], *(f"models.{name}={models / name}" for name in alignments), f"out={fused}")
    load_recipe(FuseRecipe, recipes / "fuse.yaml", list(words_of))
    recipe = str(recipes / "fuse.yaml")
    jobs.append(Job("fuse", tuple(run[-1].name for run in aligned), "fuse.sh", 0, (recipe, *words_of), fused))
    jobs += _training("train", ("fuse",), (recipes / "train.yaml",), [*own["train"], f"model={fused}"], "fused", out)
    folders = [str(models / name) for name in (*alignments, "fused_init", "fused")]
    scores = out / "evaluation"
    options = ("--records", str(heldout), "--out", str(scores))
    jobs.append(Job("evaluate", (jobs[-1].name,), "evaluate.sh", 0, (*folders, *options), scores))
    return _left(jobs)


def _training(
    job: str, after: tuple[str, ...], recipe: tuple[Path | str, ...], words: Sequence[str], name: str, out: Path
) -> list[Job]:
    """A run, and what makes a model folder of the checkpoint that ZeRO-3 leaves; the other stages leave the folder themselves."""
    model, checkpoint = out / "models" / name, out / "checkpoints" / name
    path, *given = (str(word) for word in recipe)
    checked = load_recipe(TrainRecipe, path, [*given, *words, f"out={checkpoint}"])
    sharded = read_deepspeed(checked.deepspeed).get("zero_optimization", {}).get("stage", 0) == 3
    target = checkpoint if sharded else model
    script = "align.sh" if job.startswith("align") else "train.sh"
    run = Job(job, after, script, checked.ranks, (path, *given, *words, f"out={target}"), target)
    if not sharded:
        return [run]
    return [run, Job(f"consolidate_{name}", (job,), "consolidate.sh", 0, (str(checkpoint), str(model)), model)]


def _align_recipe(recipes: Path, name: str) -> tuple[Path | str, ...]:
    try:
        find(recipes / f"align_{name}.yaml")
        return (recipes / f"align_{name}.yaml",)
    except MissingInputError:
        return (recipes / "align.yaml", f"alignment={name}")


def _by_step(words: Sequence[str]) -> dict[str, list[str]]:
    own: dict[str, list[str]] = {step: [] for step in STEPS}
    for word in words:
        step, dot, rest = word.partition(".")
        if word == TINY:
            for values in own.values():
                values.insert(0, word)
        elif dot and step in STEPS and "=" in rest:
            own[step].append(rest)
        else:
            raise UsageError(f"'{word}': whose is it? (works: {', '.join(f'{step}.key=value' for step in STEPS)}, {TINY})")
    return own


def _left(jobs: list[Job]) -> list[Job]:
    """Without the jobs whose results are there, and without the runs whose model is there."""
    made = {job.name for job in jobs if job.makes.exists()}
    made |= {job.after[0] for job in jobs if job.name in made and job.script == "consolidate.sh"}
    return [
        Job(job.name, tuple(name for name in job.after if name not in made), job.script, job.ranks, job.words, job.makes)
        for job in jobs
        if job.name not in made
    ]


def main(arguments: list[str]) -> int:
    """Prints the jobs; errors for people otherwise."""
    try:
        if len(arguments) < 3:
            raise UsageError(USAGE)
        jobs = plan(Path(arguments[0]), Path(arguments[1]), Path(arguments[2]), arguments[3:])
    except H3Error as error:
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        return error.exit_code
    for job in jobs:
        print(job.name, ",".join(job.after) or "-", job.script, job.ranks, *job.words, sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
