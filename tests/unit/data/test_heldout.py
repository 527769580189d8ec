"""The leak check against all pairs, and the shapes of evaluation files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h3scale.data.duplicates import words
from h3scale.data.encode import Encoded
from h3scale.data.heldout import Heldout, heldout_prompts, seen_prompts
from h3scale.data.records import Record
from h3scale.data.store import Tokens
from h3scale.errors import DataError, MissingInputError
from tests.unit.data.test_duplicates import FEW_WORDS, SEEDED, jaccard


def leaks_by_all_pairs(heldout: list[str], prompts: list[str], similarity: float) -> list[int]:
    listed = [words(text) for text in heldout]
    sets = [set(found) for found in listed]
    leaks = []
    for prompt in map(words, prompts):
        found = [jaccard(set(prompt), other) for other in sets]
        best = max(found, default=0.0)
        leaks.append(listed.index(prompt) if prompt in listed else found.index(best) if best >= similarity else -1)
    return leaks


@SEEDED
@given(st.lists(FEW_WORDS, max_size=12), st.lists(FEW_WORDS, max_size=8), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0]))
def test_leaks_are_those_of_all_pairs(heldout, prompts, similarity):
    assert Heldout(heldout, similarity).leaks(prompts) == leaks_by_all_pairs(heldout, prompts, similarity)


def test_leaks_by_example():
    heldout = Heldout(["How do I kill a Python process?", "hi", "2 + 2", "a b c d e f g"])
    assert heldout.leaks(["how do i KILL a python process", "How do I stop a Python process now?", "Hi!", "hi there"]) == [
        0,
        -1,
        1,
        -1,
    ]
    assert heldout.leaks(["How do I kill a Java process?", "2 - 2", "a b c d e f g h i j", "a b c d e f g h i j k"]) == [
        0,
        -1,
        3,
        -1,
    ]
    assert Heldout([]).leaks(["hi", ""]) == [-1, -1]
    assert Heldout(["", "x", "x"]).leaks(["", "x", "y"]) == [0, 1, -1]


def test_real_leaks_are_those_of_all_pairs(real_data: Path):
    heldout = heldout_prompts(real_data / "coconot_eval_prompts.jsonl")
    prompts = heldout_prompts(real_data / "helpful.jsonl")[-300:] + heldout[:50]
    leaks = Heldout(heldout).leaks(prompts)
    assert leaks == leaks_by_all_pairs(heldout, prompts, 0.7)
    assert leaks[-50:] == list(range(50))
    assert any(leak >= 0 for leak in leaks[:-50])


CHOSEN = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("ABCD")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "response": "Hello"}, "Hi"),
        ({"question": "Who?", "mc1_choices": ["I", "you"]}, "Who?"),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, "Sum\n\n1 2"),
        ({"instruction": "Sing", "input": ""}, "Sing"),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}, "U"),
        (
            {"prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]},
            "A\n\nC",
        ),
        ({"prompt": "A", "chosen": CHOSEN, "rejected": CHOSEN}, "A\n\nC"),
        ({"prompt": "A", "chosen": CHOSEN[3:], "rejected": CHOSEN[3:]}, "A"),
        ({"chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D"}, "A\n\nC"),
    ],
)
def test_usual_shapes_of_evaluation_files(tmp_path, row, prompt):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n" + json.dumps(row).encode())
    assert heldout_prompts(path) == [prompt, prompt]


def test_findings_name_line_and_fields(tmp_path):
    path = tmp_path / "eval.jsonl"
    lines = [
        '{"prompt": "ok"}',
        '{"text": "x", "label": 1}',
        "nonsense",
        '{"prompt": ""}',
        '{"messages": [{"role": "system", "content": "S"}]}',
        '{"messages": ["x"]}',
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        heldout_prompts(path)
    findings = error.value.findings
    assert findings[0] == f"{path}:2: no prompt (found: text, label; works: prompt, question, instruction, messages)"
    assert [finding.split(":")[1] for finding in findings] == ["2", "3", "4", "5", "6"]
    path.write_text('{"x": 1}\n' * 30)
    with pytest.raises(DataError, match="and 10 more"):
        heldout_prompts(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        heldout_prompts(path)
    with pytest.raises(MissingInputError, match="no such file"):
        heldout_prompts(tmp_path / "nowhere.jsonl")


def test_every_real_file_is_readable(real_data: Path):
    for path in real_data.glob("*.jsonl"):
        assert len(heldout_prompts(path)) == len(path.read_bytes().splitlines())


def test_seen_prompts_are_those_that_training_has_token_by_token():
    def tokens(*records: tuple[str, list[int], list[int]]) -> Tokens:
        made = [
            Encoded.of(Record(str(i), a, "p", "r"), prompt + answer, len(prompt)) for i, (a, prompt, answer) in enumerate(records)
        ]
        return Tokens.of(made, ("helpful", "honest"))

    training = tokens(("helpful", [1, 2, 3], [9]), ("honest", [4, 5], [6, 7]), ("other", [8, 8], [1]))
    held_out = tokens(
        ("helpful", [1, 2, 3], [5]),  # the same prompt, another answer
        ("honest", [1, 2], [3]),  # the beginning of one
        ("honest", [4, 5, 6], [7]),  # the same tokens, another cut
        ("helpful", [8, 8], [2]),  # of a record that is not trained on
        ("other", [4, 5], [2]),  # not scored
        ("honest", [4, 5], [2]),  # under another alignment
    )
    assert seen_prompts(held_out, training).tolist() == [0, 5]
