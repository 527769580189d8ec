"""A study as a table: Markdown for documents, and the short one for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Results = Mapping[str, Any]


def write_table(results: Results, path: Path) -> None:
    """All models, a line each; where a number is the best of its column it is bold."""
    path.write_text(markdown(results), encoding="utf-8")


def markdown(results: Results) -> str:
    """The table with what is needed to read it."""
    alignments, main = results["alignments"], results["main"]
    heads = [
        "model",
        "group",
        *(f"NLL {a}" for a in alignments),
        "mean NLL",
        *(f"gain {a}" for a in alignments),
        "mean gain",
        "balance",
    ]
    heads += [
        "parameters (M), active",
        "tokens (M)",
        "as many",
        "training (s)",
        "making (s)",
        f"{main} minus it, mean NLL",
        "over seeds",
        "says",
        f"{main} minus it, balance",
        "over seeds",
        "says",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    best_nll = min(model["mean_nll"]["mean"] for model in results["models"].values())
    best_balance = max((m["balance"]["mean"] for m in results["models"].values() if m["balance"]["mean"] is not None), default=None)
    for name, model in results["models"].items():
        paired = model.get("paired", {})
        cells = [f"**{name}**" if name == main else name, model["group"]]
        cells += [f"{model['nll'][a]['mean']:.4f}" for a in alignments]
        cells += [_bold(f"{model['mean_nll']['mean']:.4f}", model["mean_nll"]["mean"] == best_nll)]
        cells += [gain(model["gain"][a]["mean"]) for a in alignments]
        cells += [with_interval(model["mean_gain"], 2)]
        cells += [_bold(with_interval(model["balance"], 2), best_balance is not None and model["balance"]["mean"] == best_balance)]
        cells += [
            f"{model['parameters']['total'] / 1e6:.2f}, {model['parameters']['active'] / 1e6:.2f}",
            f"{model['tokens'] / 1e6:.2f}",
        ]
        cells += ["yes" if model["same_tokens"] else "no", _seconds(model["train_s"]), _seconds(model["make_s"])]
        cells += [
            with_interval(paired.get("mean_nll"), 4, "+"),
            with_interval(paired.get("over_seeds"), 4, "+"),
            paired.get("verdict", ""),
            with_interval(paired.get("balance"), 2, "+"),
            with_interval(paired.get("balance_over_seeds"), 2, "+"),
            paired.get("balance_verdict", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_pairs(results), *_answers(results), *legend(results), *results["notes"]]) + "\n"


def _pairs(results: Results) -> list[str]:
    """What the recipe asks about two models, a line each."""
    rows = []
    for pair in results["comparisons"]:
        cells = [
            f"{pair['one']} less {pair['other']}",
            with_interval(pair["mean_nll"], 4, "+"),
            with_interval(pair["over_seeds"], 4, "+"),
        ]
        cells += [pair["verdict"], with_interval(pair["balance"], 2, "+"), with_interval(pair["balance_over_seeds"], 2, "+")]
        cells += [pair["balance_verdict"]]
        rows.append(f"| {' | '.join(cells)} |")
    head = "| two models | mean NLL | over seeds | says | balance | over seeds | says |"
    return [head, "|" + "---|" * 7, *rows, ""] if rows else []


def _answers(results: Results) -> list[str]:
    """The suite's other scores, a line a model; marked where both intervals tell the main model's from it."""
    models = results["models"]
    scores = models[results["main"]]["scores"]
    if not scores:
        return []
    heads = ["model", *(f"{score['task']}: {score['metric']}".replace("_", " ") for score in scores)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, model in models.items():
        cells = [f"{score['mean']:.3f}{answer_mark(model, score)}" for score in model["scores"]]
        lines.append(f"| {' | '.join([f'**{name}**' if name == results['main'] else name, *cells])} |")
    return [*lines, ""]


def answer_mark(model: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    """What is added where this model is surely better or worse than the main one in a score of answers."""
    key = [score[part] for part in ("task", "metric", "alignment")]
    for apart in model.get("paired", {}).get("scores", []):
        if [apart[part] for part in ("task", "metric", "alignment")] == key:
            return {"better": " worse", "worse": " better"}.get(apart["verdict"], "")
    return ""


def legend(results: Results) -> list[str]:
    """What the columns are, in sentences."""
    seeds, main = results["seeds"], results["main"]
    counted = (
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
        if len(seeds) > 1
        else f"one seed ({seeds[0]}): nothing is known of others"
    )
    return [
        f"Suite {results['suite']}, {counted}. NLL: nats per response token on held-out records, lower is better. Gain: (base - "
        "model) / (base - best aligned model of that alignment), in NLL; 0 is the base, 1 the best model that was aligned as "
        "align.yaml says. Balance: the least gain.",
        "Tokens are those trained on after the base, by the model and all that it is made of; 'as many': as "
        f"{main}. Seconds are of the clock, after the base, for all that it took{_where_known(results)}. Intervals: 95%, of the "
        "items, paired; over seeds: Student's.",
        f"Better, worse or undecided: what both intervals let one say of {main}, or of the first of two. Balance of the items is "
        "the least gain of NLL averaged over the seeds; over seeds it is the mean of each seed's own least gain.",
        f"Of scores of answers higher is better; 'worse' and 'better': both intervals say so of this model beside {main}.",
        *([f"Made by {len(results['code'])} states of the source."] if len(results["code"]) > 1 else []),
    ]


def _where_known(results: Results) -> str:
    return ", in those seeds of which it is known" if len(results["seeds"]) > 1 else ""


def show(results: Results, console: Console) -> None:
    """Gains, balance and the paired difference of each model, the best first."""
    main = results["main"]
    table = Table(
        title="Gain over the base (1: the best aligned model)", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for head in ("", *results["alignments"], "balance", "mean NLL", f"{main} minus it"):
        table.add_column(head, justify="right" if head else "left")
    for name, model in sorted(results["models"].items(), key=lambda entry: float(entry[1]["mean_nll"]["mean"])):
        cells = [gain(model["gain"][a]["mean"]) for a in results["alignments"]]
        difference = with_interval(model.get("paired", {}).get("mean_nll"), 4, "+")
        table.add_row(name, *cells, gain(model["balance"]["mean"]), f"{model['mean_nll']['mean']:.4f}", difference)
    console.print()
    console.print(table)


def gain(value: float | None) -> str:
    """A gain, or that there is none to speak of."""
    return "none" if value is None else f"{value:.2f}"


def with_interval(number: Mapping[str, float | None] | None, digits: int, sign: str = "") -> str:
    """A number with its interval, as far as they are known."""
    if number is None or number["mean"] is None:
        return ""
    mean = f"{number['mean']:{sign}.{digits}f}"
    return mean if number["low"] is None else f"{mean} ({number['low']:{sign}.{digits}f} to {number['high']:{sign}.{digits}f})"


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best and text else text


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
