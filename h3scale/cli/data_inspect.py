"""h3scale data inspect."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h3scale.cli.train import Overrides, RecipeArgument

if TYPE_CHECKING:
    from h3scale.config.recipe import TrainRecipe
    from h3scale.data.inspect import Inspection
    from h3scale.data.loader import TypedLoader
    from h3scale.data.simulate import Simulation

Out = Annotated[Path | None, typer.Option("--out", help="Folder for inspect.png and inspect.json.", show_default=False)]
Simulate = Annotated[
    int | None, typer.Option("--simulate", help="Replay so many steps without a model and check what each rank gets.")
]
Ranks = Annotated[int | None, typer.Option("--ranks", help="With --simulate: ranks to replay; the recipe's by default.")]
Samples = Annotated[int, typer.Option("--samples", min=0, help="Packed rows to show as text.")]


def inspect(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    simulate: Simulate = None,
    ranks: Ranks = None,
    samples: Samples = 1,
) -> None:
    """Show what a run will be fed: sources, lengths, shares, padding, epochs, and rows as the model gets them.

    No model is loaded and nothing is trained. Without --out the picture and its numbers go to a folder `inspect` beside
    the recipe's `out`; those of an earlier look are replaced.

    Example: h3scale data inspect recipes/demo/base.yaml data=my-records
    """
    from h3scale.cli import data_inspect_tables as tables
    from h3scale.config.base import load_recipe
    from h3scale.config.recipe import TrainRecipe
    from h3scale.config.tiny import TINY
    from h3scale.data.inspect import inspect_run
    from h3scale.data.samples import sample_rows
    from h3scale.data.simulate import simulate as replay
    from h3scale.errors import H3Error
    from h3scale.model.start import load_tokenizer
    from h3scale.model.tiny import make_models

    settings = load_recipe(TrainRecipe, recipe, overrides or [])
    world_size = _check_simulation(settings, simulate, ranks)
    folder = out or Path(settings.out).parent / "inspect" / Path(settings.out).name
    if TINY in (overrides or []):
        make_models(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)  # type: ignore[arg-type]
    loader = _loader(settings, tokenizer)
    found = inspect_run(loader, settings.rows_per_micro_batch)
    console = tables.console()
    tables.show(console, found)
    tables.show_rows(console, sample_rows(loader, tokenizer, samples), loader.alignments, loader.length)
    replayed = None if simulate is None else replay(loader, world_size, simulate, settings.rows_per_micro_batch)
    if replayed:
        tables.show_simulation(console, replayed, loader.alignments, settings.rows_per_micro_batch)
    _write(folder, recipe, found, loader, replayed)
    if replayed and replayed.faults:
        raise H3Error(replayed.faults)
    print(f"result: {folder}", flush=True)
    loader.check_lengths()  # what would stop the training stops here, when all has been shown
    print(f"next:   h3scale train {shlex.join([recipe, *(overrides or [])])}")


def _check_simulation(recipe: TrainRecipe, steps: int | None, ranks: int | None) -> int:
    """The number of ranks to replay; UsageError (2) for what does not fit the recipe, before any record is read."""
    from h3scale.data.simulate import check_ranks, check_steps
    from h3scale.errors import UsageError

    if steps is None:
        if ranks is not None:
            raise UsageError(f"--ranks {ranks}: needs --simulate STEPS")
        return recipe.ranks
    check_steps(steps, recipe.steps)
    world_size = recipe.ranks if ranks is None else ranks
    check_ranks(world_size, recipe.data.rows_per_batch, recipe.rows_per_micro_batch)
    return world_size


def _loader(recipe: TrainRecipe, tokenizer: Any) -> TypedLoader:
    """The loader that training would make; records are prepared if they are not yet."""
    from h3scale.data.loader import TypedLoader
    from h3scale.data.prepare import prepare, prepared_folder, relevant_alignments

    store = prepare(recipe.data, tokenizer, prepared_folder(recipe.data, recipe.out))
    alignments = relevant_alignments(store, recipe.data, recipe.alignment, _known_alignments(recipe.model))
    return TypedLoader(store, recipe.data, seed=recipe.seed, alignments=alignments, steps=recipe.steps)


def _known_alignments(model: str | None) -> tuple[str, ...] | None:
    """The label order of a fused model, from its config alone; None for a dense one."""
    from h3scale.checkpoint.shards import read_json
    from h3scale.model.experts import ExpertMap

    path = Path(model, "config.json") if model else None
    expert_map = ExpertMap.from_config(read_json(path)) if path and path.is_file() else None
    return expert_map.alignments if expert_map else None


def _write(folder: Path, recipe: str, found: Inspection, loader: TypedLoader, replayed: Simulation | None) -> None:
    """inspect.png and inspect.json, complete or not at all."""
    from h3scale.cli.data_inspect_plots import draw
    from h3scale.errors import OutputError

    numbers = {"recipe": recipe, "order": loader.fingerprint, **found.as_json()}
    if replayed:
        numbers["simulation"] = replayed.as_json()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw(found, folder / ".partial-inspect.png")
        (folder / ".partial-inspect.png").replace(folder / "inspect.png")
        partial = folder / ".partial-inspect.json"
        partial.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder / "inspect.json")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from error
