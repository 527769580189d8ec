"""h3scale study."""

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe (YAML), such as recipes/study/builtin.yaml.", show_default=False)]
Data = Annotated[Path | None, typer.Option(help="Folder of one JSONL an alignment and the suite's files, over the recipe's.")]
Seed = Annotated[list[int] | None, typer.Option("--seed", min=0, help="This seed instead of the recipe's; may be given again.")]


def study(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for everything the study makes.")] = Path("study-out"),
    quick: Annotated[bool, typer.Option("--quick", help="With the recipe's section `quick`: the way, not the numbers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all commands with estimated times, and run nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even where --out is of another study: what differs goes.")] = False,
    data: Data = None,
    seed: Seed = None,
) -> None:
    """Set data mixtures, merges and fusions of one base side by side: one table, one page.

    Every step is an ordinary command that is printed. The same command goes on where it was stopped, and after a change of the
    recipes runs only what depends on it.

    Example: h3scale study recipes/study/builtin.yaml --quick --out study-quick
    """
    from rich.console import Console

    from h3scale.config.base import find
    from h3scale.config.study import load_study
    from h3scale.study.ledger import keys_of
    from h3scale.study.plan import plan_study
    from h3scale.study.run import claimed, run_plan, show_plan

    given: dict[str, Any] = {"data": str(data) if data else None, "seeds": seed or None}
    chosen = load_study(recipe, quick, {key: value for key, value in given.items() if value is not None})
    plan = plan_study(chosen)
    console = Console(highlight=False)
    if dry_run:
        show_plan(plan, out, console)
        return
    keys = keys_of(plan)  # its findings come before the folder
    of = " ".join([str(find(recipe).resolve()), *(["--quick"] if quick else []), *([f"--data {data.resolve()}"] if data else [])])
    with claimed(out, of, force) as lock:
        ledger = run_plan(plan, keys, out, console, lock)
        from h3scale.study.outcome import assemble
        from h3scale.study.study_page import write_page
        from h3scale.study.study_table import show, write_table

        results = assemble(chosen, plan, ledger)
        write_table(results, out / "table.md")
        write_page(results, out / "study.html")
        show(results, console)
    console.print(f"\nresult: {out / 'study.html'}  (table: {out / 'table.md'}, numbers: {out / 'results.json'})", soft_wrap=True)
