"""Items of an evaluation: a prompt and answers to it, of which some are right. What is wrong with a file is said line by line."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from h3scale.data.lines import read_lines
from h3scale.data.pairs import pair_of
from h3scale.data.records import BadRow, Record, Turn, check_sound, kind_of, names_of, parse_line, text_of
from h3scale.errors import DataError, MissingInputError

MAX_SHOWN = 20  # findings printed before "and N more"

Where = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Item:
    """A prompt and its distinct answers; the rest are indices into `answers`.

    best: the one right answer among `others` (MC1, or the chosen one). true, false: all right and all wrong ones (MC2, MC3).
    history: the turns before the prompt, oldest first.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    best: int
    others: tuple[int, ...]
    true: tuple[int, ...]
    false: tuple[int, ...]
    history: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """What is answered: the history and the prompt."""
        return [{"role": role, "content": content} for role, content in (*self.history, ("user", self.prompt))]


def read_items(path: str | Path, kind: Literal["choices", "pairs"], where: Where | None = None, seed: int = 0) -> list[Item]:
    """The items of a file of JSON lines, those that have the values of `where`.

    pairs: `prompt`, `chosen`, `rejected`, as texts or as messages (see `pair_of`). choices: `question` (or `prompt`),
    `mc1_choices`, `mc1_label` (an index), and `mc2_choices`, `mc2_labels` (0 or 1 each), or Hugging Face's `mc1_targets`,
    `mc2_targets` ({choices, labels}); without mc2 the best answer is the only right one. Other fields are let
    be. Answers are put in an order that `seed` and the item say, not the file: public sets list the right answer first.

    Raises MissingInputError (66) if there is no such file, DataError (65) for every line that is wrong, and where nothing is left.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    read = _pair if kind == "pairs" else _choices
    items: list[Item] = []
    findings: list[str] = []
    num_rows = 0
    for number, line in _rows(path):
        num_rows += 1
        try:
            row = parse_line(line) if isinstance(line, bytes) else _bad(line)
            if _is_wanted(row, where or {}):
                items.append(read(row, str(number), seed))
        except BadRow as error:
            findings.append(f"{path}:{number}: {error}")
    if not findings and not items:
        wanted = ", ".join(f"{key} {value}" for key, value in (where or {}).items())
        findings = [f"{path}: none of {num_rows} lines has {wanted}" if num_rows else f"{path}: is empty (works: JSON lines)"]
    if findings:
        raise DataError(findings[:MAX_SHOWN] + ([f"and {len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []))
    return items


def drawn(items: Sequence[Any], ids: Sequence[str], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` of the items, in their order; which ones depends on the seed and their ids alone."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = sorted(range(len(items)), key=lambda i: _digest(seed, ids[i]))[:limit]
    return [items[i] for i in sorted(chosen)]


Answers = tuple[list[str], int, list[int]]  # answers, the best one's index, and of each 1 right, 0 wrong


def _rows(path: Path) -> Iterator[tuple[int, bytes | str]]:
    for number, line in enumerate(read_lines(str(path), path.suffix == ".gz"), start=1):
        if not (isinstance(line, bytes) and line.isspace()):
            yield number, line


def _bad(text: str) -> dict[str, Any]:
    raise BadRow(text)


def _is_wanted(row: Mapping[str, Any], where: Where) -> bool:
    for key, values in where.items():
        if key not in row:
            raise BadRow(f"{key}: is missing (found: {names_of(row)}; `where` asks for it)")
        if row[key] not in ([values] if isinstance(values, str) else values):
            return False
    return True


def _pair(row: Mapping[str, Any], name: str, seed: int) -> Item:
    history, prompt, chosen, rejected = pair_of(row)
    answers = ([chosen, rejected], 0, [1, 0])
    return _item(name, history, prompt, answers, answers, seed)


def _choices(row: Mapping[str, Any], name: str, seed: int) -> Item:
    prompt = text_of(row, "question" if "question" in row else "prompt")
    answers, labels = _labelled(row, "mc1")
    if sum(labels) != 1 or len(answers) < 2:
        raise BadRow(f"mc1: {len(answers)} answers, {sum(labels)} of them right (works: two or more, one right)")
    first = (answers, labels.index(1), labels)
    if "mc2_choices" not in row and "mc2_targets" not in row:
        return _item(name, (), prompt, first, first, seed)
    answers, labels = _labelled(row, "mc2")
    if len(set(labels)) != 2:
        raise BadRow(f"mc2: {sum(labels)} of {len(labels)} answers are right (works: some right, some wrong)")
    return _item(name, (), prompt, first, (answers, -1, labels), seed)


def _labelled(row: Mapping[str, Any], name: str) -> tuple[list[str], list[int]]:
    targets = row.get(f"{name}_targets")
    if targets is not None:
        if type(targets) is not dict:
            raise BadRow(f"{name}_targets: expected an object with choices and labels, found {kind_of(targets)}")
        answers, labels = targets.get("choices"), targets.get("labels")
    else:
        answers, labels = row.get(f"{name}_choices"), row.get(f"{name}_labels")
        if name == "mc1" and type(answers) is list and type(row.get("mc1_label")) is int:
            labels = [int(i == row["mc1_label"]) for i in range(len(answers))]
    if type(answers) is not list or not all(type(text) is str and text.strip() for text in answers):
        raise BadRow(f"{name}_choices: expected a list of texts (found: {names_of(row)})")
    if len(set(answers)) != len(answers):
        raise BadRow(f"{name}_choices: the same answer twice")
    if type(labels) is not list or len(labels) != len(answers) or any(label not in (0, 1) for label in labels):
        raise BadRow(f"{name}_labels: expected 0 or 1 for each of {len(answers)} answers")
    return answers, [int(label) for label in labels]


def _item(name: str, history: tuple[Turn, ...], prompt: str, first: Answers, second: Answers, seed: int) -> Item:
    """Of `first` the best answer and the others, of `second` all that are right or wrong."""
    answers, best, _ = first
    judged, _, labels = second
    for text in (*answers, *judged):
        check_sound(Record("", "", prompt, text, history=history))
    texts = sorted({*answers, *judged}, key=lambda text: _digest(seed, name, text))
    place = {text: i for i, text in enumerate(texts)}
    true, false = (tuple(place[t] for t, label in zip(judged, labels, strict=True) if label == value) for value in (1, 0))
    others = tuple(place[text] for text in answers if text != answers[best])
    return Item(name, prompt, tuple(texts), place[answers[best]], others, true, false, history)


def _digest(seed: int, *texts: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()
