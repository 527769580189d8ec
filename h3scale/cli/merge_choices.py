"""What helps to choose a merge: h3scale merge --explain and --search, each a folder with JSON and a picture."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from h3scale.checkpoint.journal import resumed_folder
from h3scale.checkpoint.shards import new_folder, read_json, write_json
from h3scale.data.records import Record, without_sources
from h3scale.data.sources import read_records
from h3scale.errors import DataError
from h3scale.evaluation.merge_plots import draw_conflicts, draw_search
from h3scale.fusion.explain import collision, explain
from h3scale.fusion.merge import How, MergePlan
from h3scale.study.merge_search import Choice, axes_for, chosen, search, search_key

SEARCH = "search.json"


def explain_into(folder: Path, plan: MergePlan, force: bool) -> None:
    """Writes explain.json and explain.png, and prints where the models collide most."""
    with new_folder(folder, force) as partial:
        explained = explain(plan)
        told = collision(explained)
        write_json(partial / "explain.json", explained)
        draw_conflicts(explained, told, partial / "explain.png")
    print(told)
    print(f"explained: {folder}/explain.png, {folder}/explain.json")


def search_into(folder: Path, plan: MergePlan, records: Sequence[Record], budget: int, how: How, force: bool) -> Choice:
    """Writes search.json and search.png, or reads what the same search has left there; gives what was best."""
    axes_for(plan)  # its findings come before the work
    key = search_key(plan, records, budget)
    result = _found(folder, key) or _searched(folder, key, plan, records, budget, how, force)
    print(_best(plan, result))
    for other, difference in result["paired"].items():
        print(f"less that of {other}: {difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})")
    print(f"searched: {folder}/search.png, {folder}/search.json")
    return chosen(plan, result)


def validation_records(files: Sequence[Path], excluded: Sequence[str], per_alignment: int | None) -> list[Record]:
    """What a search sees: of each alignment the first so many records that are of no excluded source. DataError (65) for none."""
    records = without_sources(read_records(files), excluded)
    if not records:
        raise DataError(f"--records: every record is of a source that --exclude-source names: {', '.join(excluded)}")
    return _first_of_each(records, per_alignment)


def _found(folder: Path, key: str) -> dict[str, Any] | None:
    """What an earlier process has found by the same search: the merge after it may have been cut off."""
    path = folder / SEARCH
    try:
        result = read_json(path) if path.is_file() else {}
    except DataError:  # not a search's
        return None
    return result if result.get("key") == key else None


def _searched(
    folder: Path, key: str, plan: MergePlan, records: Sequence[Record], budget: int, how: How, force: bool
) -> dict[str, Any]:
    with resumed_folder(folder, key, force, how.fsync) as work:  # under one name, so that what a kill leaves is found again
        changes = work.folder / "changes"
        changes.mkdir(exist_ok=True)
        try:
            result = search(plan, records, budget, changes, how).result | {"key": key}
        finally:
            shutil.rmtree(changes)
        write_json(work.folder / SEARCH, result)
        draw_search(result, _best(plan, result), work.folder / "search.png")
    return result


def _best(plan: MergePlan, result: Mapping[str, Any]) -> str:
    best = result["best"]
    told = ", ".join(f"{key} {value:g}" for key, value in best["point"].items())
    return f"{plan.recipe.method}: {told} is best, mean NLL {best['nll']:.4f} on {result['records']} records"


def _first_of_each(records: Sequence[Record], count: int | None) -> list[Record]:
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        seen[record.alignment] += 1
        if count is None or seen[record.alignment] <= count:
            found.append(record)
    return found
