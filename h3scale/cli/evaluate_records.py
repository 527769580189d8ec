"""Records on the command line: models scored on them one by one, and NLL and shares side by side on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from h3scale.data.records import Record
    from h3scale.evaluation.evaluate import Options
    from h3scale.evaluation.score import RecordScore


def score_records(
    models: Mapping[str, Path], heldout: Sequence[Record], train: Sequence[Record], options: Options
) -> dict[str, dict[str, Any]]:
    """Results by name, the last with `paired`; models are in memory one at a time, records encoded once a tokenizer."""
    from h3scale.checkpoint.shards import TOKENIZER_FILES
    from h3scale.data.encode import encode_records
    from h3scale.evaluation.bag import bag_accuracy
    from h3scale.evaluation.evaluate import evaluate_model, open_model

    encodings: dict[tuple[bytes, ...], tuple[Any, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[RecordScore]] = {}
    for name, folder in models.items():
        model, tokenizer = open_model(folder, options.experts)
        key = tuple((folder / file).read_bytes() if (folder / file).is_file() else b"" for file in TOKENIZER_FILES)
        if key not in encodings:
            encoded = encode_records(tokenizer, heldout)
            encodings[key] = encoded, bag_accuracy(encode_records(tokenizer, train), encoded) if train else None
        encoded, bag = encodings[key]
        results[name], found = evaluate_model(model, tokenizer, encoded, options, what=f"score {name}")
        scores[name] = found.records
        if bag:
            results[name]["bag"] = bag
    paired = _paired(scores)
    if paired:
        results[list(models)[-1]]["paired"] = paired
    return results


def _paired(scores: Mapping[str, Sequence[RecordScore]]) -> dict[str, dict[str, float]]:
    """The last model minus each other one, below 0 where the last is better; without models of another tokenizer."""
    from dataclasses import asdict

    from h3scale.errors import DataError
    from h3scale.evaluation.score import paired_difference
    from h3scale.log import logger

    *others, last = scores
    found = {}
    for other in others:
        try:
            found[other] = asdict(paired_difference(scores[last], scores[other]))
        except DataError as error:
            logger.warning("%s and %s: %s", last, other, error)
    return found


def show_records(console: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """NLL of models x alignments with the best of each column in bold, the shares, the paired differences."""
    _show_nll(console, "NLL per response token, 95% interval; lower is better", results)
    for text in next(iter(results.values())).get("without", {}):
        rest = {name: result["without"][text] for name, result in results.items()}
        _show_nll(console, f"The same without the records whose source says '{text}'", rest)
    _show_shares(console, results)
    for name, result in results.items():
        for other, d in result.get("paired", {}).items():
            verdict = "better" if d["high"] < 0 else "worse" if d["low"] > 0 else "no difference that these records show"
            interval = f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
            console.print(f"{name} minus {other}, mean NLL: {interval}: {verdict}", soft_wrap=True)
        for note in result["notes"]:
            console.print(f"{name}: note: {note}", soft_wrap=True)


def _table(title: str, alignments: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for alignment in (*alignments, "mean"):
        table.add_column(alignment, justify="right")
    return table


def _show_nll(console: Any, title: str, results: Mapping[str, dict[str, Any]]) -> None:
    alignments = list(dict.fromkeys(a for result in results.values() for a in result["nll"]))
    if not alignments:
        return
    table = _table(title, alignments)
    rows = {}
    for name, result in results.items():
        entries = [result["nll"][alignment] for alignment in alignments]
        cells = [(e["nll"], f"\n[dim]{e['low']:.3f} to {e['high']:.3f}[/]") for e in entries]
        rows[name] = [*cells, (sum(value for value, _ in cells) / len(cells), "")]
    best = [min(row[column][0] for row in rows.values()) for column in range(len(alignments) + 1)]
    for name, row in rows.items():
        marked = zip(row, best, strict=True)
        table.add_row(
            name, *[f"[bold]{value:.3f}[/]{rest}" if value == low else f"{value:.3f}{rest}" for (value, rest), low in marked]
        )
    console.print(table)


def _show_shares(console: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """Router accuracy, the bag of words beside it, exact match: what is a share of the records of an alignment."""
    rows: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        if "router" in result:
            rows[f"{name}: router, by record"] = result["router"]["accuracy"]
            rows[f"{name}: router, by token"] = result["router"]["per_token"]["accuracy"]
            rows[f"{name}: router, last prompt token"] = result["router"]["last_prompt_token"]["accuracy"]
    for result in results.values():
        if "bag" in result:
            rows["bag of words, by record"] = result["bag"]["accuracy"]
    for name, result in results.items():
        if "exact_match" in result:
            rows[f"{name}: exact match"] = {a: entry["exact"] for a, entry in result["exact_match"].items()}
    alignments = list(dict.fromkeys(alignment for row in rows.values() for alignment in row))
    if not alignments:
        return
    table = _table("Right answers", alignments)
    for name, row in rows.items():
        shares = [f"{row[a]:.1%}" if a in row else "" for a in alignments]
        table.add_row(name, *shares, f"{sum(row.values()) / len(row):.1%}" if row else "")
    console.print(table)
