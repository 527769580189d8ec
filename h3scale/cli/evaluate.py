"""h3scale evaluate."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h3scale.evaluation.evaluate import Options
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
    folders = dict(zip(_names(models, out), models, strict=True))
    from h3scale.checkpoint.shards import check_output
    from h3scale.evaluation.evaluate import Options

    check_output(out, force)
    options = Options(router, generate, tuple(exclude_source or ()), experts)
    results = _score(folders, options, records, bag_train, suite, data, processes, _scored(out))
    _finish(out, results, force)
    target = f"{out}/" if len(models) > 1 else str(out)
    picture = f"   picture: {_picture(out, len(models))}" if suite else ""
    print(f"\nresults: {target}{picture}   next: h3scale generate {models[-1]} 'your prompt'")


def _score(
    folders: Mapping[str, Path],
    options: Options,
    records: Sequence[Path] | None,
    bag_train: Sequence[Path] | None,
    suite: str | None,
    data: Path | None,
    processes: int,
    scored: Path,
) -> dict[str, dict[str, Any]]:
    """Results by name. All files are read before a model is."""
    from h3scale.cli.evaluate_records import score_records
    from h3scale.data.sources import read_records
    from h3scale.evaluation.suite import load_suite

    loaded = load_suite(suite, data) if suite else None
    heldout = read_records(records) if records else []
    train = read_records(bag_train) if bag_train else []
    results: dict[str, dict[str, Any]] = {name: {} for name in folders}
    if heldout:
        results = score_records(folders, heldout, train, options)
    if loaded:
        _add_suite(results, loaded, folders, options, processes, scored)
    return results


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

    suite_result = evaluate_ensemble(load_suite(suite, data), list(models), experts, _scored(out))
    _finish(out, {out.stem: {"suite": suite_result}}, force)
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
    from h3scale.evaluation.measures import differences
    from h3scale.evaluation.run_suite import evaluate_suite

    found = evaluate_suite(loaded, folders, router=options.router, experts=options.experts, processes=processes, journal=scored)
    for name, result in found.items():
        results[name]["suite"] = result
    *others, last = found
    paired = {name: [asdict(one) for one in differences(found[last]["items"], found[name]["items"])] for name in others}
    if paired:
        found[last]["paired"] = paired


def _scored(out: Path) -> Path:
    """What remembers the scored items until all is done."""
    return out.with_name(f"{out.name}.scored")


def _finish(out: Path, results: Mapping[str, dict[str, Any]], force: bool) -> None:
    """The results are written and shown; what was remembered for going on is no longer needed."""
    _write(out, results, force)
    shutil.rmtree(_scored(out), ignore_errors=True)
    _show(results)


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
    """What was found on records, then the suite."""
    from rich.console import Console

    from h3scale.cli.evaluate_records import show_records
    from h3scale.cli.evaluate_scores import show_scores

    console = Console(highlight=False)
    of_records = {name: result for name, result in results.items() if "nll" in result}
    if of_records:
        show_records(console, of_records)
    suites = {name: result["suite"] for name, result in results.items() if "suite" in result}
    if suites:
        show_scores(console, suites)
