"""The built-in records are what the grammar gives, right, small in words, and without leaks between the splits."""

import re
import string
from collections import Counter

import pytest

from h3scale.data.builtin import ANIMALS, NUMBERS, RECORDS_DIR, TASKS, Records, as_jsonl, builtin_records, words_of

LETTERS = set(string.ascii_letters + " ,.:?")


@pytest.fixture(scope="module")
def splits() -> tuple[Records, Records]:
    return builtin_records()


@pytest.fixture(scope="module")
def records(splits: tuple[Records, Records]) -> Records:
    return [*splits[0], *splits[1]]


def of_task(records: Records, task: str) -> Records:
    return [record for record in records if record["source"] == f"builtin:{task}"]


def test_shipped_files_are_what_the_grammar_gives(splits: tuple[Records, Records]) -> None:
    for name, split in zip(("train", "heldout"), splits, strict=True):
        assert (RECORDS_DIR / f"{name}.jsonl").read_bytes() == as_jsonl(split).encode(), "python -m h3scale.data.builtin"
    assert sum(path.stat().st_size for path in RECORDS_DIR.iterdir()) < 4_000_000


def test_another_seed_gives_other_records() -> None:
    assert builtin_records(0, 6, 6) == builtin_records(0, 6, 6)
    assert builtin_records(0, 6, 6) != builtin_records(1, 6, 6)


def test_no_prompt_occurs_twice(records: Records) -> None:
    assert max(Counter(record["prompt"].lower() for record in records).values()) == 1
    assert max(Counter(record["id"] for record in records).values()) == 1


def test_alignments_and_tasks_are_balanced(splits: tuple[Records, Records]) -> None:
    for split in splits:
        assert len(set(Counter(record["alignment"] for record in split).values())) == 1
        for alignment, tasks in TASKS.items():
            counts = [len(of_task(split, task.__name__)) for task in tasks]
            assert max(counts) - min(counts) <= 1, alignment


def test_words_are_few_and_all_met_in_train(splits: tuple[Records, Records]) -> None:
    train, heldout = ({word for r in split for word in words_of(f"{r['prompt']} {r['response']}")} for split in splits)
    assert len(train | heldout) <= 1000
    assert heldout <= train


def test_records_are_short_plain_text(records: Records) -> None:
    for record in records:
        assert 8 <= len(record["prompt"].split()) <= 40, record
        assert 1 <= len(record["response"].split()) <= 16, record
        for text in (record["prompt"], record["response"]):
            assert set(text) <= LETTERS, record
            assert text == " ".join(text.split())
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", record["prompt"]), record


def test_sums_are_right(records: Records) -> None:
    for record in of_task(records, "arithmetic"):
        a, b = [NUMBERS.index(word) for word in words_of(record["prompt"]) if word in NUMBERS]
        is_minus = re.search(r"minus|take away|gives|takes", record["prompt"])
        assert NUMBERS.index(words_of(record["response"])[3]) == (a - b if is_minus else a + b), record


def test_sorted_lists_are_sorted(records: Records) -> None:
    for record in of_task(records, "sorting"):
        items = record["response"].split(", ")
        table = ANIMALS if items[0] in ANIMALS else NUMBERS
        assert sorted(items, key=table.index) == items
        assert sorted(items) == sorted(word for word in words_of(record["prompt"]) if word in table)
    assert sorted(ANIMALS) == ANIMALS


def test_extracted_items_stand_in_the_note(records: Records) -> None:
    for record in of_task(records, "extraction"):
        for said in record["response"].removesuffix(".").split(" and "):
            kind, item = said.removeprefix("The ").removeprefix("the ").split(" is ")
            assert f"the {kind}" in record["prompt"]
            assert re.search(rf"\b{item}\b", record["prompt"]), record


def test_passage_says_what_is_answered_and_nothing_else(records: Records) -> None:
    def passage_says(record: dict[str, str], claim: str) -> bool:
        person, fact = claim.split(" ", 1)
        sentence = next(s for s in re.split(r"(?<=[.?:]) ", record["prompt"]) if "," in s and s.endswith("."))
        return sentence.startswith(f"{person} ") and fact in sentence

    for record in of_task(records, "answered"):
        assert passage_says(record, record["response"].removesuffix(".")), record
    for record in of_task(records, "unanswered"):
        gap = record["response"].removeprefix("The passage does not say ").removesuffix(".")
        if gap.startswith("who "):
            assert gap.removeprefix("who ") not in record["prompt"].split(" who ")[0], record


def test_held_out_acts_are_new_and_their_parts_are_not(splits: tuple[Records, Records]) -> None:
    train, heldout = ({record["response"] for record in of_task(split, "declined")} for split in splits)
    assert not train & heldout
    assert {response.split(", because")[1] for response in heldout} <= {response.split(", because")[1] for response in train}
