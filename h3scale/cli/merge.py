"""h3scale merge."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h3scale.cli.checkpoint import parse_size
from h3scale.errors import UnsafeError, UsageError

if TYPE_CHECKING:
    from h3scale.config.merge import MergeRecipe
    from h3scale.fusion.merge import MergePlan

Named = tuple[str, Path]
_OVERRIDE = re.compile(r"[a-z_][\w.]*=.*", re.DOTALL)


def merge(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]... [KEY=VALUE]...", help="Models; options of the method.", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model that they were aligned from.")] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="Such as ties or resm, see docs/merge.md.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="The folder to write.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the base's by default.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="A recipe (YAML), such as recipes/resm_llama3_8b.yaml.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where it is computed: cpu, cuda or cuda:N.")] = "cpu",
    workers: Annotated[int, typer.Option("--workers", min=0, help="Threads; 0: one for each core, up to 8.")] = 0,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest weights file, such as 5GB or 500MB.")] = "5GB",
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Write down the sha256 of every file that is read.")] = True,
    fsync: Annotated[bool, typer.Option("--fsync/--no-fsync", help="--no-fsync is for measuring.", hidden=True)] = True,
    explain: Annotated[
        Path | None, typer.Option("--explain", help="Merge nothing; write here where the models collide (a folder).")
    ] = None,
    search: Annotated[
        Path | None, typer.Option("--search", help="Choose the scaling (and density, ...) first; write here how (a folder).")
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option("--records", help="Validation records (JSONL) for --search, not the test's; may be repeated."),
    ] = None,
    records_per_alignment: Annotated[
        int | None, typer.Option("--records-per-alignment", min=1, help="Of these records the first so many of each alignment.")
    ] = None,
    exclude_source: Annotated[
        list[str] | None,
        typer.Option("--exclude-source", help="Without records whose `source` has this text in it; again for more."),
    ] = None,
    budget: Annotated[int, typer.Option("--budget", min=3, help="Merges that --search may evaluate.")] = 12,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the models, print what would be done, write nothing.")] = False,
) -> None:
    """Merge dense models (or LoRA adapters) of one base into one dense model.

    Every tensor is streamed: memory does not grow with the models. A merge that was cut off goes on when the command is
    repeated.

    Example: h3scale merge models/helpful models/harmless models/honest --base models/base --method ties --out models/merged
    density=0.3
    """
    from h3scale.config.merge import load_merge

    given = {"base": base, "method": method, "out": out, "dtype": dtype, "models": models_of(words or []) or None}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if not values and recipe is None:
        raise UsageError("merge: no models (works: MODEL MODEL --base BASE --method NAME --out DIR, or --recipe FILE)")
    if exclude_source and search is None:
        raise UsageError("merge: --exclude-source is for the records of --search (works: --search DIR --records validation.jsonl)")
    _check_together(explain is not None, search is not None, bool(records), dry_run)
    overrides = [word for word in words or [] if is_override(word)]
    fallback = {"method": "task_arithmetic", "out": ""} if explain else {}
    checked, options = load_merge(recipe, values, overrides, fallback)
    check_folders(_written(checked, explain, search), _read(checked, records or []))
    max_shard_bytes = parse_size(max_shard_size)
    # torch is imported from here on: a mistake is answered at once.
    from h3scale.checkpoint.shards import check_output
    from h3scale.cli.merge_choices import explain_into, search_into, validation_records
    from h3scale.fusion.device import check_device, out_of_memory_told
    from h3scale.fusion.merge import How, plan_merge
    from h3scale.fusion.merge import merge as carry_out

    check_device(device)
    how = How(device, workers, max_shard_bytes, hashes, fsync)
    with out_of_memory_told(device):
        if explain is not None:
            explain_into(explain, plan_merge(checked, options, device), force)
            return
        if dry_run:
            _show(plan_merge(checked, options))
            return
        searched = None
        if search is not None:
            check_output(checked.out, force)
            plan = plan_merge(checked, options, device)
            seen = validation_records(records or [], exclude_source or [], records_per_alignment)
            choice = search_into(search, plan, seen, budget, how, force)
            options, searched = choice.options, choice.summary()
        done = carry_out(checked, options, force, how, _show, searched)
    told = f"{done.num_bytes / 1e6:.1f} MB, {done.duration_s:.1f} s"
    print(f"merged model: {done.out}, {told}   next: h3scale checkpoint verify {done.out}")


def _check_together(explain: bool, search: bool, records: bool, dry_run: bool) -> None:
    if search != records:
        raise UsageError("merge: --search and --records need each other (works: --search DIR --records validation.jsonl)")
    if explain and search:
        raise UsageError("merge: --explain merges nothing and --search merges what is best (works: one of them)")
    if dry_run and (explain or search):
        raise UsageError(f"merge: --dry-run writes nothing and {'--explain' if explain else '--search'} does (works: one of them)")


def check_folders(written: Sequence[Named], read: Sequence[Named]) -> None:
    """UnsafeError (77) when what is written is, contains or lies in what is read, or something else that is written."""
    findings = []
    for place, (name, path) in enumerate(written):
        for other, kept in [*read, *written[:place]]:
            if kept.resolve().is_relative_to(path.resolve()):
                findings.append(f"{name}: {path} would replace {other}: {kept} (choose another folder)")
            elif path.resolve().is_relative_to(kept.resolve()):
                findings.append(f"{name}: {path} lies in {other}: {kept} (choose another folder)")
    if findings:
        raise UnsafeError(findings)


def _written(recipe: "MergeRecipe", explain: Path | None, search: Path | None) -> list[Named]:
    paths = {"out": Path(recipe.out) if recipe.out or not explain else None, "explain": explain, "search": search}
    return [(name, path) for name, path in paths.items() if path is not None]


def _read(recipe: "MergeRecipe", records: Sequence[Path]) -> list[Named]:
    models = [("base", recipe.base), *((f"models.{label}", path) for label, path in recipe.models.items())]
    return [*((name, Path(path)) for name, path in models if path is not None), *(("records", path) for path in records)]


def is_override(word: str) -> bool:
    """Whether a word is key=value and not a folder."""
    return bool(_OVERRIDE.fullmatch(word)) and not Path(word).exists()


def models_of(words: list[str]) -> list[str]:
    """The words that are models."""
    return [word for word in words if not is_override(word)]


def _show(plan: "MergePlan") -> None:
    print(plan.text(), flush=True)
