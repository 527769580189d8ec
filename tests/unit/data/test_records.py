"""Records: every broken line is named, the alignment is a field, equal instructions stay on one side of a split."""

import json
from pathlib import Path

import pytest

from h3scale.data.records import Record, read_records, split_by_instruction, write_records
from h3scale.errors import DataError, MissingInputError

GOOD = {"id": "a", "alignment": "helpful", "prompt": "Sort 2, 1.", "response": "1, 2"}


def write(folder: Path, *lines: object, name: str = "r.jsonl") -> Path:
    path = folder / name
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        (b"", "an empty line"),
        (b'{"id": "b", }', "not valid JSON at character 13"),
        (b'"text"', "expected a JSON object, found str"),
        (b'{"prompt": "\xff"}', "not valid UTF-8 at byte 13"),
        ({**GOOD, "id": "b", "response": "  "}, "'response' must be a text that is not empty"),
        ({**GOOD, "id": "b", "prompt": 3}, "'prompt' must be a text that is not empty"),
        ({"id": "b", "prompt": "p", "response": "r"}, "'alignment' is missing (found: id, prompt, response)"),
        (GOOD, "id 'a' was used before, in"),
        (b'{"alignment": "helpful", "prompt": "p", "prompt": "q", "response": "r"}', "'prompt' is written twice"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: object, finding: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert caught.value.findings[0].startswith(f"{path}:2: {finding}")
    assert len(caught.value.findings) == 1


def test_all_broken_lines_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, b"{", GOOD, b"[]", b"")
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert [finding.split(": ")[0] for finding in caught.value.findings] == [f"{path}:1", f"{path}:3", f"{path}:4"]


def test_instruction_records_are_read_with_their_input(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"type": "honest", "instruction": "Who?", "input": "A text.", "output": "It does not say.", "source": "x"}
    )
    (record,) = read_records([path])
    assert record == Record("r-1", "honest", "Who?\n\nA text.", "It does not say.", "x")


def test_a_missing_file_and_an_alignment_without_records_are_told(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.jsonl: no such file"):
        read_records([tmp_path / "nowhere.jsonl"])
    with pytest.raises(DataError, match="alignment 'honest' has no records"):
        read_records([write(tmp_path, GOOD)], ["helpful", "honest"])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [Record(f"{i}", "honest", f"é\u2028{i}\n\nx", "ß", "s") for i in range(5)]
    write_records(tmp_path / "sub" / "r.jsonl", records)
    assert read_records([tmp_path / "sub" / "r.jsonl"]) == records


def test_equal_instructions_stay_together_whatever_else_is_there() -> None:
    records = [Record(f"{i}", "honest", f"Question {i % 50}?\n\nPassage {i}", "a") for i in range(500)]
    train, heldout = split_by_instruction(records, 0.3)
    assert 0 < len(heldout) < len(train)
    assert not {r.prompt.split("\n")[0] for r in train} & {r.prompt.split("\n")[0] for r in heldout}
    again = split_by_instruction(records[::-1][:100], 0.3)[1]
    assert {r.id for r in again} == {r.id for r in heldout} & {r.id for r in records[::-1][:100]}


def test_the_real_records_are_split_without_a_leak(real_data: Path) -> None:
    records = read_records([real_data / f"{name}.jsonl" for name in ("helpful", "harmless", "honest")])
    train, heldout = split_by_instruction(records, 0.08)
    assert len(records) == len(train) + len(heldout) == 12527

    def instructions(part: list[Record]) -> set[str]:
        return {" ".join(r.prompt.split("\n\n")[0].lower().split()) for r in part}

    assert not instructions(train) & instructions(heldout)
