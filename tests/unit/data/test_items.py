"""Items of evaluations: the forms that are read, the order that leaks nothing, and the line of every error."""

import json
from collections import Counter

import pytest

from h3scale.data.builtin import RECORDS_DIR, as_jsonl, builtin_records
from h3scale.data.builtin_items import builtin_items
from h3scale.data.items import drawn, read_items
from h3scale.errors import DataError, MissingInputError

QUESTION = {
    "question": "Who?",
    "mc1_choices": ["best", "wrong", "worse"],
    "mc1_label": 0,
    "mc2_choices": ["best", "right", "wrong", "worse"],
    "mc2_labels": [1, 1, 0, 0],
}
PAIR = {"prompt": "Do it.", "chosen": "yes", "rejected": "no", "kind": "easy", "source": "here"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else f"{row}\n" for row in rows))
    return path


def told(item):
    """An item in words, whatever the order of its answers."""
    sides = (item.others, item.true, item.false)
    return item.prompt, item.answers[item.best], *({item.answers[i] for i in side} for side in sides)


SAID = [("user", "Hi."), ("assistant", "Hello."), ("user", "Do it.")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def ends(*turns):
    """`chosen` and `rejected` after these turns."""
    return {key: messages(*turns, ("assistant", text)) for key, text in (("chosen", "yes"), ("rejected", "no"))}


def human(*turns):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[role]}: {content}" for role, content in turns)


HH = {key: human(*SAID, ("assistant", text)) for key, text in (("chosen", "yes"), ("rejected", "no"))}


@pytest.mark.parametrize(
    "row",
    [
        ends(*SAID),
        {"prompt": None, **ends(*SAID)},
        {"prompt": "Hi.", **ends(*SAID)},
        {"prompt": "Do it.", **ends(*SAID)},
        {"prompt": "user: Hi.\nassistant: Hello.\nuser: Do it.", **ends(*SAID)},
        {"prompt": messages(*SAID), **ends()},
        {"prompt": messages(*SAID), **ends(*SAID)},
        {"prompt": messages(*SAID[:1]), **ends(*SAID)},
        {"prompt": messages(*SAID[:1]), **ends(*SAID[1:])},
        {"prompt": messages(*SAID), "chosen": "yes", "rejected": "no"},
        HH,
    ],
)
def test_every_form_of_a_preference_of_several_turns_is_the_same_item(tmp_path, row):
    (item,) = read_items(write(tmp_path / "p.jsonl", row), "pairs")
    assert (item.history, item.prompt, set(item.answers)) == (tuple(SAID[:2]), "Do it.", {"yes", "no"})
    assert item.answers[item.best] == "yes"
    assert item.messages == messages(*SAID)


@pytest.mark.parametrize("row", [{"prompt": "Do it.", **ends(SAID[-1])}, {"prompt": "Do it.", **ends()}, ends(SAID[-1])])
def test_a_preference_of_one_turn_is_that_of_texts(tmp_path, row):
    texts, listed = read_items(write(tmp_path / "p.jsonl", PAIR), "pairs") + read_items(write(tmp_path / "q.jsonl", row), "pairs")
    assert texts == listed
    assert listed.history == ()


def test_a_system_turn_may_begin(tmp_path):
    row = ends(("system", "Be brief."), SAID[-1])
    (item,) = read_items(write(tmp_path / "p.jsonl", row), "pairs")
    assert (item.history, item.prompt) == ((("system", "Be brief."),), "Do it.")


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({**ends(*SAID), "rejected": ends(SAID[-1])["rejected"]}, "rejected: has 2 turns, chosen 4"),
        ({**HH, "rejected": human(*SAID, ("assistant", "no")).replace("Hello", "Hey")}, "rejected: turn 2 is not that of chosen"),
        ({**ends(*SAID), "rejected": messages(*SAID)}, "rejected.2.role: the last turn must be the assistant's, found user"),
        ({**HH, "rejected": human(*SAID)}, "rejected: turn 3: the last turn must be the Assistant's, found Human"),
        ({**ends(*SAID), "rejected": ends(*SAID)["chosen"]}, "chosen and rejected are the same"),
        ({"prompt": "Go.", **ends(*SAID)}, "prompt: has none of the user's turns in chosen"),
        ({"prompt": messages(SAID[0]), **ends(SAID[-1])}, "prompt + chosen.1.role: expected assistant, found user"),
        ({"chosen": [], "rejected": []}, "chosen: is empty"),
        ({"chosen": ["yes"], "rejected": ["no"]}, "chosen.0: expected an object with role and content, found str"),
        ({"chosen": "yes", "rejected": "no"}, "prompt: is missing (found: chosen, rejected)"),
        (ends(("user", "Hi.\0"), *SAID[1:]), "user: has a NUL character"),
    ],
)
def test_a_preference_that_is_none_is_told_with_file_and_line(tmp_path, row, finding):
    path = write(tmp_path / "p.jsonl", PAIR, row)
    with pytest.raises(DataError) as error:
        read_items(path, "pairs")
    (line,) = error.value.findings
    assert line.startswith(f"{path}:2: {finding}")


def test_both_forms_of_truthfulqa_give_the_same_item(tmp_path):
    nested = {
        "question": "Who?",
        "mc1_targets": {"choices": QUESTION["mc1_choices"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": QUESTION["mc2_choices"], "labels": QUESTION["mc2_labels"]},
    }
    first, second = read_items(write(tmp_path / "q.jsonl", QUESTION, nested), "choices")
    assert told(first) == told(second) == ("Who?", "best", {"wrong", "worse"}, {"best", "right"}, {"wrong", "worse"})
    assert len(first.answers) == 4  # what both lists have is asked once


def test_without_mc2_the_best_answer_is_the_only_right_one(tmp_path):
    only = {key: value for key, value in QUESTION.items() if not key.startswith("mc2")}
    (item,) = read_items(write(tmp_path / "q.jsonl", only), "choices")
    assert told(item) == ("Who?", "best", {"wrong", "worse"}, {"best"}, {"wrong", "worse"})


def test_the_right_answer_does_not_stand_where_the_file_has_it(tmp_path):
    """Public sets list it first; the order is the seed's."""
    path = write(tmp_path / "p.jsonl", *[{**PAIR, "prompt": str(i)} for i in range(200)])
    items = read_items(path, "pairs")
    assert 70 <= sum(item.best == 0 for item in items) <= 130
    assert all(item.answers[item.best] == "yes" for item in items)
    assert read_items(path, "pairs") == items
    assert [item.best for item in read_items(path, "pairs", seed=1)] != [item.best for item in items]


def test_where_takes_the_lines_that_have_the_values(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIR, {**PAIR, "kind": "hard"}, {**PAIR, "kind": "odd"})
    assert [item.id for item in read_items(path, "pairs", {"kind": "hard"})] == ["2"]
    assert [item.id for item in read_items(path, "pairs", {"kind": ["odd", "easy"], "source": "here"})] == ["1", "3"]
    with pytest.raises(DataError, match="none of 3 lines has kind none"):
        read_items(path, "pairs", {"kind": "none"})


def test_a_limit_draws_by_seed_and_keeps_the_order():
    ids = [str(i) for i in range(100)]
    found = drawn(ids, ids, 10, 0)
    assert found == sorted(found, key=int)
    assert len(set(found)) == 10
    assert found == [name for name in drawn(ids[::-1], ids[::-1], 10, 0)[::-1]]  # not by place
    assert found != drawn(ids, ids, 10, 1)
    assert drawn(ids, ids, None, 0) == drawn(ids, ids, 200, 0) == ids


@pytest.mark.parametrize(
    ("kind", "row", "finding"),
    [
        ("pairs", {**PAIR, "chosen": "no"}, "chosen and rejected are the same"),
        ("pairs", {**PAIR, "rejected": " "}, "rejected: is empty"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "rejected: is missing (found: prompt, chosen)"),
        ("pairs", {**PAIR, "chosen": "a\ud800"}, "half a surrogate pair"),
        ("pairs", "{", "not valid JSON"),
        ("choices", {**QUESTION, "mc1_label": 3}, "mc1: 3 answers, 0 of them right"),
        ("choices", {**QUESTION, "mc1_choices": "best"}, "mc1_choices: expected a list of texts"),
        ("choices", {**QUESTION, "mc2_labels": [1, 0]}, "mc2_labels: expected 0 or 1 for each of 4 answers"),
        ("choices", {**QUESTION, "mc2_labels": [1, 1, 1, 1]}, "mc2: 4 of 4 answers are right"),
        ("choices", {**QUESTION, "mc2_choices": ["a", "a", "b", "c"]}, "mc2_choices: the same answer twice"),
        ("choices", {**QUESTION, "mc1_targets": []}, "mc1_targets: expected an object with choices and labels, found list"),
    ],
)
def test_every_bad_line_is_told_with_its_number(tmp_path, kind, row, finding):
    good = PAIR if kind == "pairs" else QUESTION
    path = write(tmp_path / "x.jsonl", good, row, good, row)
    with pytest.raises(DataError) as error:
        read_items(path, kind)
    assert [line.startswith(f"{path}:{number}: ") for line, number in zip(error.value.findings, (2, 4), strict=True)] == [
        True,
        True,
    ]
    assert finding in error.value.findings[0]


def test_missing_and_empty_files_are_told(tmp_path):
    with pytest.raises(MissingInputError, match="no such file"):
        read_items(tmp_path / "no.jsonl", "pairs")
    with pytest.raises(DataError, match="is empty"):
        read_items(write(tmp_path / "empty.jsonl"), "pairs")


def test_the_shipped_items_are_what_the_grammar_gives_and_held_out():
    questions, pairs = builtin_items()
    for name, rows in (("choices", questions), ("pairs", pairs)):
        assert (RECORDS_DIR / f"{name}.jsonl").read_bytes() == as_jsonl(rows).encode(), "python -m h3scale.data.builtin_items"
    heldout = {record["prompt"]: record["response"] for record in builtin_records()[1]}
    assert all(heldout[row["prompt"]] == row["chosen"] != row["rejected"] for row in pairs)
    assert all(heldout[row["question"]] == row["mc1_choices"][0] for row in questions)
    assert Counter(row["alignment"] for row in pairs) == {"helpful": 60, "harmless": 60}
