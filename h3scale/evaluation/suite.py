"""A suite of evaluations: read, cut into units of work, scored, put together. No judge is asked: all is likelihood.

A unit is some consecutive items of a task. What is in it depends on the suite and the tokenizer alone, so its numbers are the
same bits whichever process scores it, and whatever was done before.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h3scale.config.suite import Suite, Task, find_suite
from h3scale.data.encode import Encoded, encode_records
from h3scale.data.items import Item, drawn, read_items
from h3scale.data.records import Record, Turn, split_by_instruction, without_sources
from h3scale.data.sources import read_records
from h3scale.errors import DataError, H3Error, MissingInputError
from h3scale.evaluation.answers import Asked, encode_items, log_probs
from h3scale.evaluation.measures import multiple_choice, preference, summarise_items
from h3scale.evaluation.score import Route, longest, sum_nll

UNIT_ITEMS = 32
FORMAT = 1  # of what a unit's numbers mean

Asks = tuple[tuple[Turn, ...], str]  # what is asked, history and prompt


@dataclass(frozen=True)
class LoadedSuite:
    """A suite with everything its tasks ask, records or items, by the task's name. Can be sent to another process."""

    suite: Suite
    asked: dict[str, list[Item] | list[Record]]


@dataclass(frozen=True)
class Unit:
    """Some items of a task as token ids. `key` names them and how they are scored, but no model."""

    task: str
    items: list[Asked] | list[Encoded]
    key: str


@dataclass
class Work:
    """The units of a suite for one tokenizer and length; `notes` says what was cut or left out, for people."""

    units: list[Unit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_suite(suite: str | Path, data: str | Path | None = None) -> LoadedSuite:
    """A suite by its shipped name or its file, and all its files, from the folder `data` or beside it.

    Raises MissingInputError (66), ConfigError (78) and DataError (65), all findings of the files together.
    """
    path, loaded = find_suite(suite)
    folder = Path(data) if data is not None else path.parent
    asked: dict[str, list[Item] | list[Record]] = {}
    problems: list[H3Error] = []
    for name, task in loaded.tasks.items():
        try:
            asked[name] = _read(folder / task.file, task, loaded.seed)
        except (DataError, MissingInputError) as error:
            problems.append(error)
    if problems:
        findings = list(dict.fromkeys(finding for error in problems for finding in error.findings))
        if data is None and all(isinstance(error, MissingInputError) for error in problems):
            findings.append(f"suite {suite}: its files are looked for in {folder} (works: --data FOLDER)")
        raise type(problems[0])(findings)
    return LoadedSuite(loaded, asked)


def work_of(tokenizer: Any, loaded: LoadedSuite, limit: int) -> Work:
    """The suite as token ids, in units of work, for models that take `limit` tokens.

    Raises DataError (65) for texts that hold special tokens, ConfigError (78) without a chat template.
    """
    work = Work()
    for name, task in loaded.suite.tasks.items():
        encoded, notes = _encoded(tokenizer, task, loaded.asked[name], limit)
        work.notes += [f"{name}: {note}" for note in notes]
        for first in range(0, len(encoded), UNIT_ITEMS):
            part = encoded[first : first + UNIT_ITEMS]
            work.units.append(Unit(name, part, _key(part, task.alignment, limit)))
    return work


def score_unit(model: Any, unit: Unit, task: Task, alignments: Sequence[str] = (), route: Route | None = None) -> list[float]:
    """The model's numbers for a unit: of records their NLL, of items the log-probability of each answer.

    `alignments` numbers what `route` gets, as in `score_encoded`.
    """
    if task.kind == "nll":
        return sum_nll(model, unit.items, route=route, alignments=alignments).tolist()  # type: ignore[arg-type]
    label = alignments.index(task.alignment) if task.alignment in alignments else -1
    found = log_probs(model, unit.items, [label] * len(unit.items), route)  # type: ignore[arg-type]
    return [value for values in found for value in values]


def score_suite(
    model: Any,
    tokenizer: Any,
    loaded: LoadedSuite,
    *,
    route: Route | None = None,
    alignments: Sequence[str] = (),
    advance: Callable[[int], object] = lambda items: None,
) -> dict[str, Any]:
    """The result (see `result_of`) of a model that is in memory; anything that is called as a transformers model is."""
    work = work_of(tokenizer, loaded, longest(model.config))
    numbers = {}
    for unit in work.units:
        numbers[unit.key] = score_unit(model, unit, loaded.suite.tasks[unit.task], alignments, route)
        advance(len(unit.items))
    return result_of(loaded, work, numbers)


def result_of(loaded: LoadedSuite, work: Work, numbers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """As JSON: suite, seed, `scores` (task, metric, alignment, mean, low, high, items, groups), `items` by task, notes.

    An item has id, group (items with the same prompt share one), alignment, and a number a metric; of NLL the sum, with `tokens`.
    """
    items: dict[str, list[dict[str, Any]]] = {name: [] for name in loaded.suite.tasks}
    groups: dict[str, dict[Asks, int]] = {name: {} for name in loaded.suite.tasks}
    for unit in work.units:
        task, known = loaded.suite.tasks[unit.task], groups[unit.task]
        for prompt, entry in _entries(unit, task, numbers[unit.key]):
            entry = {"id": entry.pop("id"), "group": known.setdefault(prompt, len(known)), **entry}
            items[unit.task].append(entry)
    scores = [score for name, entries in items.items() for score in summarise_items(name, entries)]
    return {"suite": loaded.suite.name, "seed": loaded.suite.seed, "scores": scores, "items": items, "notes": work.notes}


def _read(path: Path, task: Task, seed: int) -> list[Item] | list[Record]:
    if task.kind != "nll":
        items = read_items(path, task.kind, task.where, seed)
        for item in items if task.template else ():
            if item.history:
                raise DataError(
                    f"{path}:{item.id}: has turns before its prompt, for which `template` has no place (works: without it)"
                )
        return drawn(items, [item.id for item in items], task.limit, seed)
    records = read_records([path], [task.alignment] if task.alignment else None)
    if task.heldout_share is not None:
        records = split_by_instruction(records, task.heldout_share, seed)[1]
    if not records:
        raise DataError(f"{path}: no record is held out at share {task.heldout_share} and seed {seed}")
    records = without_sources(records, task.exclude_source)
    if not records:
        raise DataError(f"{path}: every record is of a source that exclude_source names: {', '.join(task.exclude_source)}")
    return drawn(records, [record.id for record in records], task.limit, seed)


def _encoded(tokenizer: Any, task: Task, asked: Sequence[Any], limit: int) -> tuple[list[Any], list[str]]:
    """The items that can be scored, and notes of what was cut or left out."""
    notes = []
    if task.kind == "nll":
        records = encode_records(tokenizer, asked)
        found: list[Any] = [item.cut(limit) for item in records if item.num_response_tokens_within(limit)]
        left_out, cut, why = len(records) - len(found), sum(len(item.tokens) > limit for item in records), "no response token fits"
        what = f"were cut to the model's {limit} tokens"
    else:
        found, left_out = encode_items(tokenizer, asked, task.template, limit)
        cut, why = sum(item.cut > 0 for item in found), f"an answer alone is longer than the model's {limit} tokens"
        what = f"have a prompt whose beginning was cut, to fit the model's {limit} tokens"
    if not found:
        raise DataError(f"{task.file}: nothing fits the model's {limit} tokens")
    if cut:
        notes.append(f"{cut} of {len(asked)} items {what}")
    if left_out:
        notes.append(f"{left_out} of {len(asked)} items were left out: {why}")
    return found, notes


def _key(items: Sequence[Any], alignment: str | None, limit: int) -> str:
    """A hash of all that the numbers depend on, but for the model and its routing."""
    digest = hashlib.sha256(repr((FORMAT, limit, alignment)).encode())
    for item in items:
        if isinstance(item, Encoded):
            digest.update(repr((item.record.alignment, len(item.tokens))).encode() + item.tokens.tobytes())
        else:
            digest.update(repr((item.prompt, item.answers)).encode())
    return digest.hexdigest()[:32]


def _entries(unit: Unit, task: Task, numbers: Sequence[float]) -> Iterator[tuple[Asks, dict[str, Any]]]:
    values = iter(numbers)
    for item in unit.items:
        if isinstance(item, Encoded):
            named = {"id": item.record.id, "alignment": item.record.alignment}
            yield (item.record.history, item.record.prompt), {**named, "nll": next(values), "tokens": item.num_response_tokens}
            continue
        sums = [next(values) for _ in item.answers]
        measure = multiple_choice(item.item, sums) if task.kind == "choices" else {}
        if task.kind == "pairs":
            measure = preference(item.item, sums, [len(answer) for answer in item.answers])
        yield (item.item.history, item.item.prompt), {"id": item.item.id, "alignment": task.alignment, **measure}
