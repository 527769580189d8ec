"""h3scale train, h3scale align."""

import os
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe (YAML), such as recipes/demo/train.yaml.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, over the recipe's values.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Scratch = Annotated[bool, typer.Option("--from-scratch", help="Delete what an interrupted run has left, and begin again.")]
Change = Annotated[bool, typer.Option("--allow-change", help="Go on though recipe, records, model or code have changed.")]


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    force: Force = False,
    from_scratch: Scratch = False,
    allow_change: Change = False,
) -> None:
    """Train a base, an aligned model or a fused mixture of experts.

    Starts the recipe's `ranks` processes on this machine. On a cluster a launcher starts the ranks instead:
    `deepspeed --num_accelerators 2 --module h3scale.train RECIPE`, torchrun, or `sbatch slurm/train.sh RECIPE`.
    A run that was interrupted goes on where it was saved, when the same command is given again.

    Example: h3scale train recipes/demo/base.yaml steps=100 out=models/base
    """
    _start(recipe, overrides or [], {"--force": force, "--from-scratch": from_scratch, "--allow-change": allow_change})


def align(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    force: Force = False,
    from_scratch: Scratch = False,
    allow_change: Change = False,
) -> None:
    """Tune the FFNs of a base on the records of one alignment; attention, norms and embeddings stay frozen.

    Example: h3scale align recipes/demo/align.yaml alignment=helpful out=models/helpful
    """
    from h3scale.config.base import load_recipe
    from h3scale.config.recipe import TrainRecipe
    from h3scale.errors import ConfigError

    if load_recipe(TrainRecipe, recipe, overrides or []).alignment is None:
        raise ConfigError(f"{recipe}: alignment: is required to align (such as alignment=helpful)")
    _start(recipe, overrides or [], {"--force": force, "--from-scratch": from_scratch, "--allow-change": allow_change})


def _start(recipe: str, overrides: list[str], options: dict[str, bool]) -> None:
    from h3scale.config.base import load_recipe
    from h3scale.config.recipe import TrainRecipe
    from h3scale.launch.local import rank_command, run_ranks

    ranks = load_recipe(TrainRecipe, recipe, overrides).ranks
    words = [recipe, *overrides, *(option for option, given in options.items() if given)]
    if "WORLD_SIZE" in os.environ:
        from h3scale.train.__main__ import main

        raise typer.Exit(main(words))
    raise typer.Exit(run_ranks(rank_command("h3scale.train", words), ranks))
