"""results.json of a demo folder: all models side by side, from the evaluation files; no times, dates or paths in it."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from h3scale.checkpoint.shards import read_json, write_json

RIVALS = ("base", "helpful", "harmless", "honest", "mixture", "fused_init")  # the fused model is compared with each
MADE = (*RIVALS, "fused")


def can_assemble(out: Path) -> bool:
    """Whether out/evaluation/fused.json has what results.json is about: NLL of records, and a router's part in it."""
    path = out / "evaluation" / "fused.json"
    return path.is_file() and {"nll", "router"} <= read_json(path).keys()


def assemble(out: Path) -> dict[str, Any]:
    """Reads out/evaluation/NAME.json and out/ablations, writes and gives out/results.json. Only where `can_assemble` says so.

    `models`: NLL per response token by alignment, with 95% intervals. `router`: of the fused model, with the bag-of-words
    classifier and the router before training beside it. `paired`: mean NLL over the alignments of the fused model minus
    the other's, on the same resamples; an interval below 0 says that the fused model is better. `ablations`: the same
    training with one thing changed.
    """
    evaluations = {path.stem: read_json(path) for path in sorted((out / "evaluation").glob("*.json"), key=_place)}
    evaluations = {name: evaluation for name, evaluation in evaluations.items() if "nll" in evaluation}  # not of a suite alone
    ablations = {path.stem: read_json(path) for path in sorted((out / "ablations" / "evaluation").glob("*.json"))}
    ablations.pop("fused", None)  # it was evaluated there only to be compared with
    uniform = out / "ablations" / "uniform_router.json"
    if uniform.is_file():
        ablations["uniform_router"] = read_json(uniform)
    fused = evaluations["fused"]
    results: dict[str, Any] = {
        "models": {name: _nll(evaluation) for name, evaluation in evaluations.items()},
        "router": _router(out, evaluations),
        "paired": {
            f"fused - {name}": _paired(fused, evaluation)
            for name, evaluation in {**evaluations, **ablations}.items()
            if name in RIVALS or name in ablations
        },
        "ablations": {name: _ablation(evaluation) for name, evaluation in ablations.items()},
    }
    if "exact_match" in fused:
        results["exact_match"] = {n: e["exact_match"] for n, e in evaluations.items() if "exact_match" in e}
    for text, part in fused.get("without", {}).items():
        results.setdefault("without", {})[text] = {
            "models": {n: _nll(e["without"][text]) for n, e in evaluations.items() if "without" in e},
            "router": {"accuracy": part["router"]["accuracy"]},
        }
    write_json(out / "results.json", results)
    return results


def show(out: Path, console: Console) -> None:
    """The table, the paired intervals, where everything is, and the next command."""
    results = read_json(out / "results.json")
    alignments = list(results["router"]["accuracy"])
    table = Table(title="NLL per response token on held-out records (nats, lower is better)", title_justify="left")
    for column in ("model", *alignments, "mean"):
        table.add_column(column, justify="left" if column == "model" else "right")
    best = {a: min(model[a]["nll"] for model in results["models"].values()) for a in alignments}
    for name, model in results["models"].items():
        cells = [f"[bold]{model[a]['nll']:.3f}[/]" if model[a]["nll"] == best[a] else f"{model[a]['nll']:.3f}" for a in alignments]
        table.add_row(name, *cells, f"{sum(model[a]['nll'] for a in alignments) / len(alignments):.3f}")
    console.print()
    console.print(table)
    accuracy = "  ".join(f"{name} {share:.1%}" for name, share in results["router"]["accuracy"].items())
    console.print(f"router accuracy on held-out records: {accuracy}")
    exact = results.get("exact_match", {}).get("fused", {})
    if any(cell["exact"] for cell in exact.values()):  # open questions have no one right answer
        console.print("exact answers of the fused model: " + "  ".join(f"{a} {cell['exact']:.0%}" for a, cell in exact.items()))
    console.print(f"\nresult: {out / 'report.html'}  (numbers: {out / 'results.json'}, model: {out / 'release'})")
    console.print(f'next:   h3scale generate {out / "release"} "your question"')


def _place(path: Path) -> tuple[int, str]:
    """Models in the order in which they are made; others after them, by name."""
    return (MADE.index(path.stem) if path.stem in MADE else len(MADE), path.stem)


def _nll(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {a: {key: cell[key] for key in ("nll", "low", "high", "records")} for a, cell in evaluation["nll"].items()}


def _router(out: Path, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    fused = evaluations["fused"]
    router: dict[str, Any] = {"accuracy": fused["router"]["accuracy"], "macro": fused["router"]["macro"]}
    if "bag" in fused:
        router["bag_of_words"] = fused["bag"]["accuracy"]
    before = evaluations.get("fused_init")
    if before:
        router["before_training"] = before["router"]["accuracy"]
    start = out / "models" / "fused_init" / "fuse_report.json"
    if start.is_file():
        router["start"] = read_json(start).get("router", {})
    return router


def _ablation(evaluation: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"nll": _nll(evaluation)}
    if evaluation["router"]["mode"] == "trained":  # a forced route says nothing of the router
        found["router"] = {"accuracy": evaluation["router"]["accuracy"]}
    return found


def _paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    from h3scale.evaluation.score import RecordScore, paired_difference

    first, second = (
        [
            RecordScore(item["id"], item["alignment"], item["nll"], item["tokens"], group=item.get("group"))
            for item in evaluation["records"]
        ]
        for evaluation in (a, b)
    )
    interval = paired_difference(first, second)
    return {"difference": interval.mean, "low": interval.low, "high": interval.high}
