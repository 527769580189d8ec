"""h3scale merge."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h3scale.cli.checkpoint import parse_size
from h3scale.errors import UsageError

if TYPE_CHECKING:
    from h3scale.fusion.merge import MergePlan

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
    device: Annotated[str, typer.Option("--device", help="Where it is computed: cpu, or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option("--workers", min=0, help="Threads; 0: one for each core, up to 8.")] = 0,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest weights file, such as 5GB or 500MB.")] = "5GB",
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Write down the sha256 of every file that is read.")] = True,
    fsync: Annotated[bool, typer.Option("--fsync/--no-fsync", help="--no-fsync is for measuring.", hidden=True)] = True,
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
    overrides = [word for word in words or [] if is_override(word)]
    checked, options = load_merge(recipe, values, overrides)
    max_shard_bytes = parse_size(max_shard_size)
    # torch is imported from here on: a mistake is answered at once.
    from h3scale.fusion.merge import How, plan_merge
    from h3scale.fusion.merge import merge as carry_out

    if dry_run:
        _show(plan_merge(checked, options))
        return
    how = How(device, workers, max_shard_bytes, hashes, fsync)
    done = carry_out(checked, options, force, how, _show)
    told = f"{done.num_bytes / 1e6:.1f} MB, {done.duration_s:.1f} s"
    print(f"merged model: {done.out}, {told}   next: h3scale checkpoint verify {done.out}")


def is_override(word: str) -> bool:
    """Whether a word is key=value and not a folder."""
    return bool(_OVERRIDE.fullmatch(word)) and not Path(word).exists()


def models_of(words: list[str]) -> list[str]:
    """The words that are models."""
    return [word for word in words if not is_override(word)]


def _show(plan: "MergePlan") -> None:
    print(plan.text(), flush=True)
