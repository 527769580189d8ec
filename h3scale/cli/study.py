"""h3scale study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

What = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE | SEED...",
        help="A recipe (YAML), such as recipes/study/builtin.yaml; or files seed-N.json.gz of studies that ran elsewhere, or their "
        "folders.",
        show_default=False,
    ),
]
Data = Annotated[Path | None, typer.Option(help="Folder of one JSONL an alignment and the suite's files, over the recipe's.")]
Seed = Annotated[list[int] | None, typer.Option("--seed", min=0, help="This seed instead of the recipe's; may be given again.")]


def study(
    what: What,
    out: Annotated[Path, typer.Option(help="Folder for everything the study makes.")] = Path("study-out"),
    quick: Annotated[bool, typer.Option("--quick", help="With the recipe's section `quick`: the way, not the numbers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all commands with estimated times, and run nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even where --out is of another study: what differs goes.")] = False,
    data: Data = None,
    seed: Seed = None,
) -> None:
    """Set data mixtures, merges and fusions of one base side by side: one table, one page.

    Every step is an ordinary command that is printed. The same command goes on where it was stopped, and after a change of the
    recipes runs only what depends on it. Each seed leaves seed-N.json.gz, without models: to put together those of several
    machines, give them in the place of the recipe.

    Example: h3scale study recipes/study/builtin.yaml --quick --out study-quick
    Example: h3scale study study-a study-b/seed-1.json.gz --out study-3h
    """
    from rich.console import Console

    from h3scale.errors import UsageError
    from h3scale.study.run import claimed

    console = Console(highlight=False)
    what = [file for word in what for file in _seeds_in(word)]
    if all(word.endswith(".json.gz") for word in what):
        if quick or dry_run or data or seed:
            raise UsageError("study: --quick, --dry-run, --data and --seed are for a recipe, and seed files have run")
        from h3scale.study.evidence import read_seeds
        from h3scale.study.outcome import assemble

        seeds = read_seeds([Path(word) for word in what])
        results = assemble(seeds)  # its findings come before the folder
        with claimed(out, f"seeds that ran elsewhere, of {seeds[0].hash()}", force):
            _show(results, out, console)
        return
    if len(what) > 1:
        raise UsageError("study: one recipe, or files seed-N.json.gz alone")
    _run(what[0], out, console, quick, dry_run, force, data, seed)


def _seeds_in(word: str) -> list[str]:
    """What stands for a word: the seeds of a folder, else itself."""
    from h3scale.errors import MissingInputError

    if not Path(word).is_dir():
        return [word]
    found = sorted(str(path) for path in Path(word).glob("seed-*.json.gz"))
    if not found:
        raise MissingInputError(f"{word}: a folder without seed-N.json.gz (works: a recipe, or what a study has left)")
    return found


def _run(
    recipe: str, out: Path, console: "Console", quick: bool, dry_run: bool, force: bool, data: Path | None, seed: list[int] | None
) -> None:
    from h3scale.config.base import find
    from h3scale.config.study import load_study
    from h3scale.study.ledger import keys_of
    from h3scale.study.plan import plan_study
    from h3scale.study.run import claimed, run_plan, show_plan

    given: dict[str, Any] = {"data": str(data) if data else None, "seeds": seed or None}
    chosen = load_study(recipe, quick, {key: value for key, value in given.items() if value is not None})
    plan = plan_study(chosen)
    if dry_run:
        show_plan(plan, out, console)
        return
    keys = keys_of(plan)  # its findings come before the folder
    of = " ".join([str(find(recipe).resolve()), *(["--quick"] if quick else []), *([f"--data {data.resolve()}"] if data else [])])
    with claimed(out, of, force) as lock:
        ledger = run_plan(plan, keys, out, console, lock)
        from h3scale.study.gather import gather_seed
        from h3scale.study.outcome import assemble

        _show(assemble([gather_seed(chosen, plan, ledger, each) for each in chosen.seeds]), out, console)


def _show(results: dict[str, Any], out: Path, console: "Console") -> None:
    from h3scale.checkpoint.shards import write_json
    from h3scale.study.study_page import write_page
    from h3scale.study.study_table import show, write_table

    write_json(out / "results.json", results)
    write_table(results, out / "table.md")
    write_page(results, out / "study.html")
    show(results, console)
    console.print(f"\nresult: {out / 'study.html'}  (table: {out / 'table.md'}, numbers: {out / 'results.json'})", soft_wrap=True)
