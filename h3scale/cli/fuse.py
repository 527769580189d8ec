"""h3scale fuse."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from h3scale.fusion.execute import RouterReport
    from h3scale.fusion.plan import Plan


def fuse(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML), such as recipes/demo/fuse.yaml.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the recipe's values.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
) -> None:
    """Make one mixture of experts from a base and its aligned models.

    The FFN of each aligned model (a folder, or a PEFT LoRA adapter) becomes an expert, the base's FFN the general ones;
    the router starts from records. Prints the plan before it writes.

    Example: h3scale fuse recipes/demo/fuse.yaml out=models/fused_init
    """
    from h3scale.config.base import load_recipe
    from h3scale.config.fuse import FuseRecipe
    from h3scale.config.tiny import TINY

    checked = load_recipe(FuseRecipe, recipe, overrides or [])
    # torch is imported from here on: a recipe with a mistake is answered at once.
    from transformers.utils import logging as transformers_logging

    from h3scale.fusion.execute import fuse as carry_out
    from h3scale.fusion.execute import plan_fusion
    from h3scale.model.tiny import make_models

    transformers_logging.disable_progress_bar()
    if TINY in (overrides or []):
        make_models(checked)
    if dry_run:
        _show(plan_fusion(checked))
        return
    summary = carry_out(checked, force, _show)
    _show_router(summary.router)
    print(f"fused model: {summary.out}   next: h3scale evaluate {summary.out} --records FILE.jsonl --out FILE.json")


def _show(plan: "Plan") -> None:
    print(plan.text(), flush=True)


def _show_router(router: "RouterReport") -> None:
    if router.accuracy is None or router.random_accuracy is None:
        print("router: random, not measured (router.heldout_records names records to measure it on)")
        return
    print(f"router accuracy before training, by record ({router.measured_on}):")
    width = max(map(len, router.accuracy))
    for alignment, share in router.accuracy.items():
        print(f"  {alignment:{width}}  {router.init} {_percent(share)}   random {_percent(router.random_accuracy[alignment])}")


def _percent(share: float | None) -> str:
    return "  none" if share is None else f"{share:6.1%}"
