"""Adapters: rows in each set's own columns become records; what does not fit is named; TruthfulQA is cut without a leak."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from h3scale.config.data import Source
from h3scale.data.adapters import ADAPTERS, CUT_SIMILARITY, adapter_named, sides
from h3scale.data.records import Record
from h3scale.data.sources import Parsed, blocks, parse_block, parts_of, read_records
from h3scale.errors import ConfigError, DataError

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is an instruction ..."}
DOLLY = {"instruction": "Who?", "context": "", "response": "I.", "category": "open_qa"}
BEAVER = {"prompt": "Bomb?", "response": "No.", "category": {"animal_abuse": False, "child_abuse": False}, "is_safe": True}
SAFE = {
    "prompt": "Bomb?",
    "response_0": "Yes.",
    "response_1": "No.",
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca3-8B",
    "response_1_source": "WizardLM-30B",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Violence": True},
    "response_1_harm_category": {"Violence": False},
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "better_response_id": 0,
    "safer_response_id": 1,
    "response_0_sha256": "00",
    "response_1_sha256": "01",
}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bomb?\n\nAssistant: No.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Yes.",
}
TRUTH = {
    "type": "Adversarial",
    "category": "Misconceptions",
    "question": "What?",
    "best_answer": "Nothing.",
    "correct_answers": ["It is dull", "nothing.", "It  is dull", "", "Nothing."],
    "incorrect_answers": ["All."],
    "source": "https://example.org",
}


def parse(folder: Path, adapter: str, *rows: object, **more: Any) -> Parsed:
    path = folder / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (part,) = parts_of([Source(path=str(path), adapter=adapter, **more)])
    (block,) = blocks(part)
    return parse_block(block)


@pytest.mark.parametrize(
    ("adapter", "row", "record"),
    [
        ("tatsu-lab/alpaca", ALPACA, Record("s-1", "helpful", "Add.\n\n1 and 2", "3", "tatsu-lab/alpaca")),
        ("databricks/databricks-dolly-15k", DOLLY, Record("s-1", "helpful", "Who?", "I.", "databricks/databricks-dolly-15k")),
        ("PKU-Alignment/BeaverTails", BEAVER, Record("s-1", "harmless", "Bomb?", "No.", "PKU-Alignment/BeaverTails")),
        ("PKU-Alignment/PKU-SafeRLHF", SAFE, Record("s-1", "harmless", "Bomb?", "No.", "PKU-Alignment/PKU-SafeRLHF")),
        (
            "Anthropic/hh-rlhf",
            HH,
            Record("s-1", "harmless", "Bomb?", "No.", "Anthropic/hh-rlhf", (("user", "Hi"), ("assistant", "Hello"))),
        ),
    ],
)
def test_a_row_in_the_sets_own_columns_is_a_record(tmp_path: Path, adapter: str, row: object, record: Record) -> None:
    assert parse(tmp_path, adapter, row) == Parsed([record], [1])


def test_every_distinct_correct_answer_is_a_record_the_best_one_first(tmp_path: Path) -> None:
    for side in ("train", "heldout"):
        parsed = parse(tmp_path, "truthfulqa/truthful_qa", TRUTH, part=side)
        if parsed.filtered:
            assert parsed == Parsed(filtered=1)
            continue
        assert [(r.id, r.response) for r in parsed.records] == [("s-1.1", "Nothing."), ("s-1.2", "It is dull")]
        assert {(r.alignment, r.prompt, r.history) for r in parsed.records} == {("honest", "What?", ())}
        assert parsed.places == [1, 1]
        taken = side
    assert sides([TRUTH["question"]]) == [taken]


def test_the_generic_alpaca_takes_the_sources_alignment_and_needs_no_input(tmp_path: Path) -> None:
    parsed = parse(tmp_path, "alpaca", {"instruction": "Add.", "output": "3", "x": 1}, alignment="honest")
    assert parsed.records == [Record("s-1", "honest", "Add.", "3", "")]


def test_the_source_names_another_alignment(tmp_path: Path) -> None:
    assert parse(tmp_path, "Anthropic/hh-rlhf", HH, alignment="helpful").records[0].alignment == "helpful"


@pytest.mark.parametrize(
    ("adapter", "row"),
    [
        ("PKU-Alignment/BeaverTails", BEAVER | {"is_safe": False}),
        ("PKU-Alignment/BeaverTails", BEAVER | {"is_safe": "False"}),
        ("PKU-Alignment/PKU-SafeRLHF", SAFE | {"is_response_1_safe": False, "is_response_0_safe": True}),
    ],
)
def test_what_is_filtered_is_counted_and_not_bad(tmp_path: Path, adapter: str, row: object) -> None:
    assert parse(tmp_path, adapter, row) == Parsed(filtered=1)
    with pytest.raises(DataError) as caught:
        read_records([Source(path=str(tmp_path / "s.jsonl"), adapter=adapter)])
    assert caught.value.findings == [f"{tmp_path}/s.jsonl: no records (1 rows left out by adapter {adapter})"]


@pytest.mark.parametrize(
    ("adapter", "row", "finding"),
    [
        ("tatsu-lab/alpaca", {"instruction": "x", "answer": "y"}, "input: is missing (found: instruction, answer)"),
        ("tatsu-lab/alpaca", ALPACA | {"output": ""}, "output: is empty"),
        ("tatsu-lab/alpaca", ALPACA | {"input": 5}, "input: expected a text, found int"),
        ("databricks/databricks-dolly-15k", ALPACA, "context: is missing (found: instruction, input, output, text)"),
        ("databricks/databricks-dolly-15k", DOLLY | {"response": None}, "response: expected a text, found null"),
        ("PKU-Alignment/BeaverTails", BEAVER | {"is_safe": "maybe"}, "is_safe: expected true or false, found 'maybe'"),
        ("PKU-Alignment/BeaverTails", BEAVER | {"prompt": " "}, "prompt: is empty"),
        ("PKU-Alignment/PKU-SafeRLHF", SAFE | {"safer_response_id": 2}, "safer_response_id: expected 0 or 1, found '2'"),
        ("PKU-Alignment/PKU-SafeRLHF", SAFE | {"is_response_1_safe": 1}, "is_response_1_safe: expected true or false, found '1'"),
        ("Anthropic/hh-rlhf", {"chosen": "Hi there"}, "chosen: expected '\\n\\nHuman: ...' at its beginning"),
        ("Anthropic/hh-rlhf", {"chosen": "Hi\n\nHuman: x\n\nAssistant: y"}, "chosen: expected '\\n\\nHuman: ...' at its beginning"),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nAssistant: y"}, "chosen: turn 1: expected Human, found Assistant"),
        (
            "Anthropic/hh-rlhf",
            {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"},
            "chosen: turn 2: expected Assistant, found Human",
        ),
        ("Anthropic/hh-rlhf", {"chosen": "\n\nHuman: a\n\nAssistant:"}, "chosen: turn 2: the Assistant says nothing"),
        (
            "Anthropic/hh-rlhf",
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"},
            "chosen: turn 3: the last turn must be the Assistant's, found Human",
        ),
        ("Anthropic/hh-rlhf", {"prompt": "a"}, "chosen: is missing (found: prompt)"),
    ],
)
def test_a_row_that_does_not_fit_says_why(tmp_path: Path, adapter: str, row: object, finding: str) -> None:
    assert parse(tmp_path, adapter, row).findings == [(1, finding)]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"correct_answers": "a; b"}, "correct_answers: expected a list, found str"),
        ({"correct_answers": ["a", 3]}, "correct_answers.1: expected a text, found int"),
        ({"best_answer": ""}, "best_answer: is empty"),
        ({"question": 3}, "question: expected a text, found int"),
        ({"question": "a\0b"}, "user: has a NUL character (\\u0000) at character 2"),
        ({"question": "a\ud800"}, "user: has half a surrogate pair (\\ud800) at character 2"),
    ],
)
def test_bad_rows_of_a_set_with_a_cut_are_told(tmp_path: Path, change: dict[str, object], finding: str) -> None:
    found = [parse(tmp_path, "truthfulqa/truthful_qa", TRUTH | change, part=side).findings for side in ("train", "heldout")]
    assert [(1, finding)] in found


def test_a_set_with_a_cut_tells_malformed_lines_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"{\n\n" + json.dumps(TRUTH).encode() + b"\n")
    for side in ("train", "heldout"):
        (part,) = parts_of([Source(path=str(path), adapter="truthfulqa/truthful_qa", part=side)])
        parsed = [parse_block(block) for block in blocks(part, 2)]
        assert [number for p in parsed for number, _ in p.findings] == [1]
        assert {number for p in parsed for number in p.places} <= {3}


def test_the_cut_does_not_depend_on_the_order() -> None:
    texts = [f"{name} w{i} x{i}" for name in ("alpha", "beta", "gamma", "delta") for i in range(20)]  # 20 groups of 4
    side = dict(zip(texts, sides(texts), strict=True))
    random.Random(1).shuffle(texts)
    assert dict(zip(texts, sides(texts), strict=True)) == side
    assert set(side.values()) == {"train", "heldout"}
    assert set(sides(["  Is it SO?", "is  it so", "Is it so!"])) in ({"train"}, {"heldout"})


@pytest.mark.parametrize(
    "alike",
    [
        [" ".join(f"w{i + j}" for j in range(4)) for i in range(12)],  # neighbours share 3 of 5 words, the ends none
        ["w1 w2 w3", "w3 w4 w5", "w1 w2 w3 w4 w5"],  # the last one joins two that share 1 of 5
    ],
)
def test_alike_questions_are_on_one_side_also_through_others(alike: list[str]) -> None:
    for salt in range(16):  # each time another coin is thrown
        texts = [text.replace("w", f"v{salt}x") for text in alike]
        for order in (texts, texts[::-1], [*texts[1:], texts[0]]):
            assert len(set(sides(order))) == 1


def test_the_real_questions_are_cut_without_a_leak(real_data: Path) -> None:
    lines = (real_data / "truthfulqa_mc.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    cut = sides(questions)
    assert 0.4 < cut.count("train") / len(cut) < 0.6

    words = [set(re.findall(r"\w+", question.casefold())) for question in questions]
    near = [
        (questions[i], questions[j])
        for i in range(len(cut))
        for j in range(i)
        if cut[i] != cut[j] and len(words[i] & words[j]) >= CUT_SIMILARITY * len(words[i] | words[j])
    ]
    assert near == []


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_named("beavertail", "recipe.yaml")
    assert str(caught.value) == "recipe.yaml: adapter: unknown adapter 'beavertail' (did you mean 'PKU-Alignment/BeaverTails'?)"
    with pytest.raises(ConfigError, match=r"unknown adapter 'zzz' \(works: alpaca, tatsu-lab/alpaca, "):
        adapter_named("zzz", "x")
    assert all(adapter_named(name, "x").name == name and adapter.licence and adapter.needs for name, adapter in ADAPTERS.items())
