"""Public data sets in their own fields, as a table: which columns are used, which rows are left out, whose licence.

Columns, splits and licences are those of the sets' cards on the Hugging Face hub; columns that are not used are ignored.

TruthfulQA comes as one set of 817 questions, made for evaluation. To train on it at all it is cut here: questions whose
words are alike (Jaccard similarity of their word sets >= 0.5) are joined to groups, transitively, and whole groups go to
`train` (449) or `heldout` (368) by a hash of their alphabetically first question. So no question has a near copy on the
other side, and the side of a question does not depend on the order of the file. It does depend on which questions are in
the file: cut the whole set, never a part of it.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from h3scale.data.records import BadRow, Row, Turn, joined, kind_of, names_of, optional_text, text_of
from h3scale.errors import ConfigError

Side = Literal["train", "heldout"]
Said = tuple[tuple[Turn, ...], str, str]  # history, prompt, response

VERSION = 1  # to be raised when the same rows give other records: prepared stores are named by it
CUT_SIMILARITY = 0.5
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Adapter:
    """How the rows of one set are read.

    name: as on the hub. alignment: of all its rows, unless the source names another; None where it must. needs: columns
    that every row must have. read: what a row holds: nothing if it is filtered out, several answers give several records.
    splits: those of the hub; the first is taken where none is named. config, folder: which part of the hub's set.
    cut: the column by which the set is cut in two; such sets are read whole. note: what people should know.
    """

    name: str
    alignment: str | None
    licence: str
    needs: tuple[str, ...]
    read: Callable[[Row], list[Said]]
    splits: tuple[str, ...] = ("train",)
    config: str | None = None
    folder: str | None = None
    cut: str | None = None
    note: str = ""

    @property
    def source(self) -> str:
        """For the `source` field of its records; the generic adapter knows none."""
        return self.name if "/" in self.name else ""

    def said(self, row: Row) -> list[Said]:
        for column in self.needs:
            if column not in row:
                raise BadRow(f"{column}: is missing (found: {names_of(row)})")
        return self.read(row)


def adapter_named(name: str, where: str) -> Adapter:
    """Raises ConfigError (78), beginning with `where`, for a name that is not in the table."""
    if name not in ADAPTERS:
        ends = {full.casefold(): full for full in ADAPTERS} | {full.split("/")[-1].casefold(): full for full in ADAPTERS}
        near = difflib.get_close_matches(name.casefold(), ends, n=1)
        hint = f"did you mean '{ends[near[0]]}'?" if near else f"works: {', '.join(ADAPTERS)}"
        raise ConfigError(f"{where}: adapter: unknown adapter '{name}' ({hint})")
    return ADAPTERS[name]


def sides(texts: Sequence[str]) -> list[Side]:
    """The side of each text: alike texts are on the same one (see the top of this file). Time grows with their number squared."""
    words = [frozenset(re.findall(r"\w+", text.casefold())) for text in texts]
    groups = list(range(len(texts)))  # each text's way to the first of its group

    def first(index: int) -> int:
        while groups[index] != index:
            groups[index] = groups[groups[index]]
            index = groups[index]
        return index

    for one in range(len(texts)):
        for other in range(one):
            shared = len(words[one] & words[other])
            if shared >= CUT_SIMILARITY * (len(words[one]) + len(words[other]) - shared):
                groups[first(one)] = first(other)
    names: dict[int, str] = {}
    for index, text in enumerate(texts):
        name = " ".join(text.casefold().split())
        names[first(index)] = min(name, names.get(first(index), name))
    return ["train" if _hash(names[first(index)]) < 0.5 else "heldout" for index in range(len(texts))]


def transcript(text: str, name: str) -> Said:
    """A conversation as hh-rlhf writes it: '\\n\\nHuman: ...' and '\\n\\nAssistant: ...' in turn. `name`: what findings call it."""
    opening, *pieces = SPEAKER.split(text)
    if opening.strip() or not pieces:
        raise BadRow(f"{name}: expected '\\n\\nHuman: ...' at its beginning")
    turns: list[Turn] = []
    for number, (speaker, content) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), start=1):
        expected = "Human" if number % 2 else "Assistant"
        if speaker != expected:
            raise BadRow(f"{name}: turn {number}: expected {expected}, found {speaker}")
        if not content.strip():
            raise BadRow(f"{name}: turn {number}: the {speaker} says nothing")
        turns.append(("user" if speaker == "Human" else "assistant", content.strip()))
    if turns[-1][0] != "assistant":
        raise BadRow(f"{name}: turn {len(turns)}: the last turn must be the Assistant's, found Human")
    return tuple(turns[:-2]), turns[-2][1], turns[-1][1]


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def _instruction(context: str, response: str) -> Callable[[Row], list[Said]]:
    return lambda row: [((), joined(text_of(row, "instruction"), optional_text(row, context)), text_of(row, response))]


def _if_safe(row: Row) -> list[Said]:
    return [((), text_of(row, "prompt"), text_of(row, "response"))] if _flag(row, "is_safe") else []


def _safer_if_safe(row: Row) -> list[Said]:
    safer = str(row["safer_response_id"])
    if safer not in ("0", "1"):
        raise BadRow(f"safer_response_id: expected 0 or 1, found {safer[:20]!r}")
    safe = _flag(row, f"is_response_{safer}_safe")
    return [((), text_of(row, "prompt"), text_of(row, f"response_{safer}"))] if safe else []


def _chosen(row: Row) -> list[Said]:
    return [transcript(text_of(row, "chosen"), "chosen")]


def _all_answers(row: Row) -> list[Said]:
    answers = row["correct_answers"]
    if type(answers) is not list:
        raise BadRow(f"correct_answers: expected a list, found {kind_of(answers)}")
    question = text_of(row, "question")
    distinct: dict[str, str] = {}
    for number, answer in enumerate([text_of(row, "best_answer"), *answers]):
        if type(answer) is not str:
            raise BadRow(f"correct_answers.{number - 1}: expected a text, found {kind_of(answer)}")
        distinct.setdefault(" ".join(answer.casefold().split()), answer)
    return [((), question, answer) for key, answer in distinct.items() if key]


def _flag(row: Row, key: str) -> bool:
    value: Any = row[key]
    value = {"true": True, "false": False}.get(value.casefold(), value) if type(value) is str else value  # a CSV has texts only
    if type(value) is not bool:
        raise BadRow(f"{key}: expected true or false, found {str(value)[:20]!r}")
    return value


ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter(
            name="alpaca",
            alignment=None,
            licence="that of your file",
            needs=("instruction", "output"),
            read=_instruction("input", "output"),
            note="any file with the fields of Alpaca: instruction, input, output",
        ),
        Adapter(
            name="tatsu-lab/alpaca",
            alignment="helpful",
            licence="CC BY-NC 4.0",
            needs=("instruction", "input", "output"),
            read=_instruction("input", "output"),
        ),
        Adapter(
            name="databricks/databricks-dolly-15k",
            alignment="helpful",
            licence="CC BY-SA 3.0",
            needs=("instruction", "context", "response"),
            read=_instruction("context", "response"),
        ),
        Adapter(
            name="PKU-Alignment/BeaverTails",
            alignment="harmless",
            licence="CC BY-NC 4.0",
            needs=("prompt", "response", "is_safe"),
            read=_if_safe,
            splits=("30k_train", "30k_test", "330k_train", "330k_test"),
            note="only answers that are marked safe",
        ),
        Adapter(
            name="PKU-Alignment/PKU-SafeRLHF",
            alignment="harmless",
            licence="CC BY-NC 4.0",
            needs=("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id"),
            read=_safer_if_safe,
            splits=("train", "test"),
            note="the safer answer of the two, if it is marked safe",
        ),
        Adapter(
            name="Anthropic/hh-rlhf",
            alignment="harmless",
            licence="MIT",
            needs=("chosen",),
            read=_chosen,
            splits=("train", "test"),
            folder="harmless-base",
            note="the chosen conversations of its folder harmless-base; the set as a whole is mostly about helpfulness",
        ),
        Adapter(
            name="truthfulqa/truthful_qa",
            alignment="honest",
            licence="Apache-2.0",
            needs=("question", "best_answer", "correct_answers"),
            read=_all_answers,
            splits=("validation",),
            config="generation",
            cut="question",
            note="made for evaluation: `part: train` or `part: heldout` is required; every correct answer is a record",
        ),
    )
}
