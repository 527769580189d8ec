"""What helps to choose a merge: h3scale merge --explain and --search, each a folder with JSON and a picture."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from h3scale.checkpoint.shards import new_folder, write_json
from h3scale.config.merge import Options
from h3scale.data.records import Record
from h3scale.data.sources import read_records
from h3scale.evaluation.merge_plots import draw_conflicts, draw_search
from h3scale.fusion.explain import collision, explain
from h3scale.fusion.merge import How, MergePlan
from h3scale.study.merge_search import axes_of, search


def explain_into(folder: Path, plan: MergePlan, force: bool) -> None:
    """Writes explain.json and explain.png, and prints where the models collide most."""
    with new_folder(folder, force) as partial:
        explained = explain(plan)
        told = collision(explained)
        write_json(partial / "explain.json", explained)
        draw_conflicts(explained, told, partial / "explain.png")
    print(told)
    print(f"explained: {folder}/explain.png, {folder}/explain.json")


def search_into(
    folder: Path, plan: MergePlan, records: Sequence[Path], per_alignment: int | None, budget: int, how: How, force: bool
) -> Options:
    """Writes search.json and search.png; gives the options that were best. `per_alignment`: the first so many records of each."""
    axes_of(plan.recipe.method, plan.options)  # its findings come before the work
    with new_folder(folder, force) as partial:
        cache = partial / "changes"
        cache.mkdir()
        choice = search(plan, _first_of_each(read_records(records), per_alignment), budget, cache, how)
        shutil.rmtree(cache)
        best = choice.result["best"]
        told = ", ".join(f"{key} {value:g}" for key, value in best["point"].items())
        told = f"{plan.recipe.method}: {told} is best, mean NLL {best['nll']:.4f} on {choice.result['records']} records"
        write_json(partial / "search.json", choice.result)
        draw_search(choice.result, told, partial / "search.png")
    print(told)
    for other, difference in choice.result["paired"].items():
        print(f"less that of {other}: {difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})")
    print(f"searched: {folder}/search.png, {folder}/search.json")
    return choice.options


def _first_of_each(records: Sequence[Record], count: int | None) -> list[Record]:
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        seen[record.alignment] += 1
        if count is None or seen[record.alignment] <= count:
            found.append(record)
    return found
