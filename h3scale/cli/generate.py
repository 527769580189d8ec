"""h3scale generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from h3scale.evaluation.generate import Answer

Model = Annotated[Path, typer.Argument(help="A model folder.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="What to ask.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Experts = Annotated[str, typer.Option("--experts", help="What computes experts, as `experts` in a recipe.")]

BAR = 32  # columns of a full bar
COLOURS = ("blue", "red", "green", "magenta", "cyan", "yellow")


def generate(model: Model, prompt: Prompt, max_new_tokens: MaxNewTokens = 256, experts: Experts = "auto") -> None:
    """Answer a prompt, and for a fused model show which experts answered.

    Example: h3scale generate models/fused "Put in order: 7, 3, 9."
    """
    from h3scale.errors import UsageError

    if not prompt.strip():
        raise UsageError("prompt: is empty (write what to ask)")
    from h3scale.evaluation.evaluate import open_model
    from h3scale.evaluation.generate import generate as answer_prompt

    loaded, tokenizer = open_model(model, experts)
    answer = answer_prompt(loaded, tokenizer, prompt, max_new_tokens)
    _show(answer)


def _show(answer: Answer) -> None:
    """The answer, its tokens coloured by the alignment that the routers saw; then one bar an expert."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colour_of: dict[str, str] = {}
    for share in answer.experts:
        if share.alignment:
            colour_of.setdefault(share.alignment, COLOURS[len(colour_of) % len(COLOURS)])
    if answer.pieces:
        text = Text()
        for piece, alignment in answer.pieces:
            text.append(piece, style=colour_of.get(alignment, ""))
        text.rstrip()
    else:
        text = Text(answer.text)
    console.print(text if text.plain.strip() else "(an empty answer)", soft_wrap=True)
    if not answer.stopped and answer.new_ids:
        console.print(f"(cut after {len(answer.new_ids)} tokens: --max-new-tokens)", style="dim")
    if answer.experts:
        console.print()
    width = max((len(share.expert) for share in answer.experts), default=0)
    for share in answer.experts:
        colour = colour_of.get(share.alignment or "", "bright_black")
        bar = "█" * round(BAR * share.weight)
        console.print(
            f"{share.expert:<{width}}  [{colour}]{bar:<{BAR}}[/] {share.weight:4.0%} of the weight, "
            f"first choice {share.first:4.0%}",
            soft_wrap=True,
        )
