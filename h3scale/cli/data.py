"""h3scale data: records, their tokenizer, the prepared store."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from h3scale.cli import data_inspect
from h3scale.cli.train import Force, Overrides, RecipeArgument

app = typer.Typer(no_args_is_help=True, help="Records and tokenizers.")


@app.command()
def builtin(
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and heldout.jsonl.", show_default=False)],
    force: Force = False,
) -> None:
    """Write the built-in 3H records: a small world of some 500 words that a tiny model can learn.

    Example: h3scale data builtin data
    """
    from importlib.resources import files

    from h3scale.data.sources import read_records

    with _new(out, force) as folder:
        for name in ("train", "heldout"):
            (folder / f"{name}.jsonl").write_bytes(files("h3scale.data").joinpath(f"records_builtin/{name}.jsonl").read_bytes())
    _say(out, {name: read_records([out / f"{name}.jsonl"]) for name in ("train", "heldout")})


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="Folder with one JSONL file an alignment, or one JSONL file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and heldout.jsonl.", show_default=False)],
    alignments: Annotated[str, typer.Option(help="Which alignments, in label order.")] = "helpful,harmless,honest",
    heldout_share: Annotated[float, typer.Option(help="Share of the instructions that is held out.", min=0, max=1)] = 0.08,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    force: Force = False,
) -> None:
    """Split records into train and held-out by instruction, never by record: equal instructions stay together.

    Example: h3scale data split my-records data
    """
    from h3scale.data.records import split_by_instruction, write_records
    from h3scale.data.sources import read_records
    from h3scale.errors import DataError

    names = alignments.split(",")
    paths = [source / f"{name}.jsonl" for name in names] if not source.is_file() else [source]
    records = read_records(paths)
    unknown = sorted({record.alignment for record in records} - set(names))
    parts = split_by_instruction(records, heldout_share, seed)
    findings = [f"{source}: alignment '{name}' is not among --alignments {alignments}" for name in unknown]
    findings += [
        f"{source}: alignment '{name}' has no records on the {side} side (try another --heldout-share or --seed)"
        for side, part in zip(("train", "held-out"), parts, strict=True)
        for name in names
        if all(record.alignment != name for record in part)
    ]
    if findings:
        raise DataError(findings)
    with _new(out, force) as folder:
        for name, records in zip(("train", "heldout"), parts, strict=True):
            write_records(folder / f"{name}.jsonl", records)
    _say(out, dict(zip(("train", "heldout"), parts, strict=True)))


@app.command()
def tokenizer(recipe: RecipeArgument, overrides: Overrides = None, force: Force = False) -> None:
    """Train a SentencePiece tokenizer on records; written as a Hugging Face fast tokenizer with a chat template.

    Example: h3scale data tokenizer recipes/demo/tokenizer.yaml vocab_size=4000
    """
    from h3scale.config.base import load_recipe
    from h3scale.config.recipe import TokenizerRecipe
    from h3scale.data.sources import read_records
    from h3scale.data.tokenizer import save_tokenizer, train_tokenizer

    settings = load_recipe(TokenizerRecipe, recipe, overrides or [])
    records = read_records(settings.records)
    with _new(Path(settings.out), force) as folder:
        trained = train_tokenizer(records, settings.vocab_size, settings.character_coverage)
        save_tokenizer(trained, folder)
    print(f"{len(trained):,} tokens from {len(records):,} records")
    print(f"result: {settings.out}")
    print("next:   h3scale train recipes/demo/base.yaml")


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="One bad record is an error (data.bad_records=stop).")] = False,
) -> None:
    """Read, check, clean and tokenize a recipe's records once, into a store that is memory-mapped.

    Run again, it finds the store; killed, it goes on where it was. Training does this by itself: do it beforehand
    where the records are many, so that no GPU waits.

    Example: h3scale data prepare recipes/demo/base.yaml data=my-records
    """
    from h3scale.config.base import load_recipe
    from h3scale.config.recipe import TrainRecipe
    from h3scale.config.tiny import TINY
    from h3scale.data.prepare import prepare as prepare_store
    from h3scale.data.prepare import prepared_folder
    from h3scale.model.start import load_tokenizer
    from h3scale.model.tiny import make_models

    settings = load_recipe(TrainRecipe, recipe, [*(overrides or []), *(["data.bad_records=stop"] if strict else [])])
    if TINY in (overrides or []):
        make_models(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)  # type: ignore[arg-type]
    store = prepare_store(settings.data, tokenizer, prepared_folder(settings.data, settings.out))
    for name, counts in store.manifest["counts"].items():
        print(f"{name}: {counts['records']:,} records, {counts['tokens']:,} tokens, {counts['responses']:,} of answers")
    dropped = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in sorted(store.manifest["dropped"].items()))
    if dropped:
        print(f"dropped: {dropped}: {store.folder / 'dropped.jsonl'} says which and why")
    print(f"result: {store.folder}")
    print(f"next:   h3scale data inspect {shlex.join([recipe, *(overrides or [])])}")


app.command()(data_inspect.inspect)


@app.command()
def adapters() -> None:
    """List the public data sets whose fields are known, and under which licence they are.

    In a recipe: records: [{path: "hub:tatsu-lab/alpaca"}, {path: dolly.parquet, adapter: databricks/databricks-dolly-15k}]

    Example: h3scale data adapters
    """
    from h3scale.data.adapters import ADAPTERS

    for adapter in ADAPTERS.values():
        print(f"{adapter.name}: {adapter.alignment or 'alignment: NAME is required'}; licence: {adapter.licence}")
        if adapter.note:
            print(f"    {adapter.note}")


def _new(out: Path, force: bool):
    from h3scale.checkpoint.shards import new_folder

    return new_folder(out, force)


def _say(out: Path, parts: dict) -> None:
    for name, records in parts.items():
        counts: dict[str, int] = {}
        for record in records:
            counts[record.alignment] = counts.get(record.alignment, 0) + 1
        print(f"{name}: {', '.join(f'{count:,} {alignment}' for alignment, count in counts.items())}")
    print(f"result: {out}")
    print("next:   h3scale data tokenizer recipes/demo/tokenizer.yaml")
