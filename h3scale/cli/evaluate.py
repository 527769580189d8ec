"""h3scale evaluate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h3scale.data.records import Record
    from h3scale.evaluation.evaluate import Options
    from h3scale.evaluation.score import RecordScore
    from h3scale.evaluation.suite import LoadedSuite

Models = Annotated[list[Path], typer.Argument(help="Model folders.", show_default=False)]
Records = Annotated[list[Path] | None, typer.Option("--records", help="Held-out records (JSONL); may be given again.")]
Suite = Annotated[str | None, typer.Option("--suite", help="3h, builtin, or a YAML file: scores without a judge.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the suite's files; beside the suite by default.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that score a suite, each with its model.")]
Out = Annotated[Path, typer.Option("--out", help="FILE.json for one model; a folder of NAME.json for several.")]
Router = Annotated[str, typer.Option("--router", help="trained, uniform (all experts alike) or oracle (the record's own).")]
Generate = Annotated[int, typer.Option("--generate", min=0, help="Answers to generate for each alignment (exact match).")]
ExcludeSource = Annotated[list[str] | None, typer.Option("--exclude-source", help="Score again without such a source.")]
BagTrain = Annotated[list[Path] | None, typer.Option("--bag-train", help="Fit a bag-of-words baseline on these records.")]
Experts = Annotated[str, typer.Option("--experts", help="What computes experts, as `experts` in a recipe.")]
EnsembleOption = Annotated[bool, typer.Option("--ensemble", help="Score the models as one, by the mean of their logits.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


def evaluate(
    models: Models,
    out: Out,
    records: Records = None,
    suite: Suite = None,
    data: Data = None,
    processes: Processes = 1,
    router: Router = "trained",
    generate: Generate = 0,
    exclude_source: ExcludeSource = None,
    bag_train: BagTrain = None,
    experts: Experts = "auto",
    ensemble: EnsembleOption = False,
    force: Force = False,
) -> None:
    """Score models: NLL, router accuracy, exact match on held-out records; a suite's scores without a judge.

    Several models are compared in one table; the last is set against each other one, item by item. A suite that was
    interrupted goes on with the same command.

    Example: h3scale evaluate models/base models/fused --records heldout.jsonl --suite builtin --out evaluation
    """
    of_records = {"--generate": generate, "--exclude-source": exclude_source, "--bag-train": bag_train}
    _check_asked(records, suite, data, [name for name, value in of_records.items() if value])
    if ensemble:
        _evaluate_ensemble(models, out, suite, data, experts, force, bool(records) or router != "trained" or processes > 1)
        return
    names = _names(models, out)
    from h3scale.checkpoint.shards import check_output
    from h3scale.data.sources import read_records
    from h3scale.evaluation.evaluate import Options
    from h3scale.evaluation.suite import load_suite

    check_output(out, force)
    options = Options(router, generate, tuple(exclude_source or ()), experts)
    loaded = load_suite(suite, data) if suite else None
    heldout = read_records(records) if records else []
    train = read_records(bag_train) if bag_train else []
    folders = dict(zip(names, models, strict=True))
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    if heldout:
        results, scores = _evaluate_all(folders, heldout, train, options)
        paired = _paired(scores)
        if paired:
            results[names[-1]]["paired"] = paired
    scored = out.with_name(f"{out.name}.scored")
    if loaded:
        _add_suite(results, loaded, folders, options, processes, scored)
    _write(out, results, force)
    shutil.rmtree(scored, ignore_errors=True)
    _show(results)
    target = f"{out}/" if len(models) > 1 else str(out)
    picture = f"   picture: {_picture(out, len(models))}" if loaded else ""
    print(f"\nresults: {target}{picture}   next: h3scale generate {models[-1]} 'your prompt'")


def _evaluate_ensemble(
    models: Sequence[Path], out: Path, suite: str | None, data: Path | None, experts: str, force: bool, has_more: bool
) -> None:
    from h3scale.checkpoint.shards import check_output
    from h3scale.errors import UsageError

    if suite is None or has_more or len(models) < 2 or out.suffix != ".json":
        raise UsageError("--ensemble: two models or more on a suite (works: A B C --ensemble --suite builtin --out FILE.json)")
    check_output(out, force)
    from h3scale.evaluation.ensemble import evaluate_ensemble
    from h3scale.evaluation.suite import load_suite

    results = {out.stem: {"suite": evaluate_ensemble(load_suite(suite, data), list(models), experts)}}
    _write(out, results, force)
    _show(results)
    print(f"\nresults: {out}   picture: {_picture(out, 1)}")


def _check_asked(records: Sequence[Path] | None, suite: str | None, data: Path | None, of_records: Sequence[str]) -> None:
    from h3scale.errors import UsageError

    if not records and not suite:
        raise UsageError("nothing to score on (works: --records FILE.jsonl, --suite 3h --data FOLDER, --suite builtin, or both)")
    if of_records and not records:
        raise UsageError(f"{of_records[0]}: needs --records FILE.jsonl")
    if data is not None and not suite:
        raise UsageError(f"--data {data}: is the folder of a suite's files (works with --suite)")


def _add_suite(
    results: dict[str, dict[str, Any]],
    loaded: LoadedSuite,
    folders: Mapping[str, Path],
    options: Options,
    processes: int,
    scored: Path,
) -> None:
    """Adds `suite` to each model's result, and `paired` to the last one's: its differences to each other, by score."""
    from dataclasses import asdict

    from h3scale.evaluation.measures import differences
    from h3scale.evaluation.run_suite import evaluate_suite

    found = evaluate_suite(loaded, folders, router=options.router, experts=options.experts, processes=processes, journal=scored)
    for name, result in found.items():
        results[name]["suite"] = result
    *others, last = found
    paired = {name: [asdict(one) for one in differences(found[last]["items"], found[name]["items"])] for name in others}
    if paired:
        found[last]["paired"] = paired


def _picture(out: Path, num_models: int) -> Path:
    return out / "scores.png" if num_models > 1 else out.with_suffix(".png")


def _names(models: Sequence[Path], out: Path) -> list[str]:
    """A name a model, from its folder; UsageError (2) when two are equal or the output has the wrong form."""
    from h3scale.errors import UsageError

    names = [model.resolve().name for model in models]
    if len(models) > 1 and out.suffix == ".json":
        raise UsageError(f"--out {out}: several models need a folder (such as --out {out.with_suffix('')})")
    if len(models) == 1 and out.suffix != ".json":
        raise UsageError(f"--out {out}: one model needs a file (such as --out {out}.json)")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two models have the folder name '{twice[0]}' (rename one, or evaluate them one by one)")
    return names


def _evaluate_all(
    models: Mapping[str, Path], heldout: Sequence[Record], train: Sequence[Record], options: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, list[RecordScore]]]:
    """Results and record scores by name; models are in memory one at a time, records encoded once a tokenizer."""
    from h3scale.checkpoint.shards import TOKENIZER_FILES
    from h3scale.data.encode import encode_records
    from h3scale.evaluation.bag import bag_accuracy
    from h3scale.evaluation.evaluate import evaluate_model, open_model

    encodings: dict[tuple[bytes, ...], tuple[Any, Any]] = {}
    results, scores = {}, {}
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
    return results, scores


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


def _write(out: Path, results: Mapping[str, Any], force: bool) -> None:
    from h3scale.checkpoint.shards import new_folder, write_json
    from h3scale.errors import OutputError

    if len(results) == 1:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, next(iter(results.values())))
            _draw(results, _picture(out, 1))
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
        return
    with new_folder(out, force) as folder:
        for name, result in results.items():
            write_json(folder / f"{name}.json", result)
        _draw(results, _picture(folder, len(results)))


def _draw(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    suites = {name: result["suite"] for name, result in results.items() if "suite" in result}
    if suites:
        from h3scale.evaluation.score_plots import draw_scores

        title = f"Suite {next(iter(suites.values()))['suite']}, with 95% intervals"
        draw_scores(suites, title, path)


def _show(results: Mapping[str, dict[str, Any]]) -> None:
    """NLL of models x alignments with the best of each column in bold, the shares, the paired differences; then the suite."""
    from rich.console import Console

    from h3scale.cli.evaluate_scores import show_scores

    console = Console(highlight=False)
    of_records = {name: result for name, result in results.items() if "nll" in result}
    if of_records:
        _show_records(console, of_records)
    suites = {name: result["suite"] for name, result in results.items() if "suite" in result}
    if suites:
        show_scores(console, suites)


def _show_records(console: Any, results: Mapping[str, dict[str, Any]]) -> None:
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
