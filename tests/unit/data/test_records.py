"""Records: every bad line says what is wrong with it, the alignment is a field, equal instructions stay on one side."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from h3scale.data.records import BadRow, Record, check_sound, parse_line, record_of, split_by_instruction, write_records
from h3scale.data.sources import read_records

ROW = {"id": "a", "alignment": "helpful", "prompt": "Sort 2, 1.", "response": "1, 2"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def talk(*messages: object) -> dict[str, object]:
    return {"alignment": "helpful", "messages": list(messages)}


def say(role: object, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


def without(key: str) -> dict[str, str]:
    return {name: value for name, value in ROW.items() if name != key}


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        (b'{"id": "b", \n', "not valid JSON at character 14 (Expecting property name enclosed in double quotes)"),
        (b'{"prompt": [1, x]}\n', "not valid JSON at character 16 (Expecting value)"),
        (b'{"a": 1} {"a": 2}\n', "not valid JSON at character 10 (Extra data)"),
        (b"{'prompt': 1}\n", "not valid JSON at character 2 (Expecting property name enclosed in double quotes)"),
        (
            b'{"prompt": "Sort',
            "not valid JSON at character 12 (Unterminated string starting at; the line has no end: the file was cut off)",
        ),
        (b"[\n", "not valid JSON at character 3 (Expecting value; works: an object on each line, not one array)"),
        (b'{"prompt": "a\0\0b"}\n', "a NUL byte at byte 14 (the file was damaged, as by a crash)"),
        (b"\0" * 512, "a NUL byte at byte 1 (the file was damaged, as by a crash)"),
        (b'{"prompt": "\xff"}\n', "not valid UTF-8 at byte 13"),
        (b'\xff\xfe{\0"\0\n', "a NUL byte at byte 4 (the file was damaged, as by a crash)"),
        (b'{"prompt": "\xed\xa0\x80"}\n', "not valid UTF-8 at byte 13"),
        (b'{"prompt": "p", "prompt": "q"}\n', "prompt: is written twice"),
        (b'{"metadata": {"a": 1, "b": 2, "b": 3}}\n', "b: is written twice"),
        (b'{"metadata": NaN}\n', "NaN is not JSON (works: a number or null)"),
        (b'{"metadata": [-Infinity]}\n', "-Infinity is not JSON (works: a number or null)"),
        (
            b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
            "nested too deeply (works: messages and metadata of a few levels)",
        ),
        (b'{"metadata": ' + b"9" * 5000 + b"}\n", "a number with too many digits"),
        (b'"text"\n', "expected a JSON object, found str"),
        (b"[1, 2]\n", "expected a JSON object, found list"),
        (b"7\n", "expected a JSON object, found int"),
        (b"null\n", "expected a JSON object, found null"),
    ],
)
def test_a_line_that_is_no_json_object_says_why(line: bytes, finding: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_line(line)
    assert str(caught.value) == finding


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({}, "prompt: is missing (found: nothing)"),
        (without("prompt"), "prompt: is missing (found: id, alignment, response)"),
        (without("response"), "response: is missing (found: id, alignment, prompt)"),
        (without("alignment"), "alignment: is missing (found: id, prompt, response; works too: alignment of the whole source)"),
        (ROW | {"prompt": 3}, "prompt: expected a text, found int"),
        (ROW | {"prompt": None}, "prompt: expected a text, found null"),
        (ROW | {"response": " \n"}, "response: is empty"),
        (ROW | {"response": ""}, "response: is empty"),
        (ROW | {"id": True}, "id: expected a text or a whole number, found bool"),
        (ROW | {"id": 1.5}, "id: expected a text or a whole number, found float"),
        (ROW | {"source": ["x"]}, "source: expected a text, found list"),
        (ROW | {"alignment": 1}, "alignment: expected a text, found int"),
        (ROW | {"type": "honest"}, "type: 'honest' differs from alignment 'helpful' (works: one of the two)"),
        (ROW | {"promt": "x"}, "promt: unknown key (did you mean 'prompt'?)"),
        (ROW | {"n\nx": "x"}, "n\\nx: unknown key (works: prompt, response, id, alignment, type, source, metadata)"),
        (
            ROW | {"\ud800" * 50: "x"},
            "\\ud800" * 40 + "...: unknown key (works: prompt, response, id, alignment, type, source, metadata)",
        ),
        (ROW | {"messages": [USER, ASSISTANT]}, "prompt: unknown key (works: messages, id, alignment, type, source, metadata)"),
        ({"type": "x", "instruction": "q"}, "output: is missing (found: type, instruction)"),
        ({"type": "x", "output": "q"}, "instruction: is missing (found: type, output)"),
        ({"type": "x", "instruction": "q", "output": "a", "input": 1}, "input: expected a text, found int"),
        (talk() | {"messages": "Hi"}, "messages: expected a list, found str"),
        (talk(), "messages: is empty"),
        (talk("Hi"), "messages.0: expected an object with role and content, found str"),
        (talk(say("user", 5), ASSISTANT), "messages.0.content: expected a text, found int"),
        (talk(USER, say("assistant", None)), "messages.1.content: expected a text, found null"),
        (talk(USER, say("assistant", "")), "messages.1.content: is empty"),
        (talk(USER, {"role": "assistant"}), "messages.1.content: is missing (found: role)"),
        (talk(USER, {"content": "x"}), "messages.1.role: is missing (found: content)"),
        (talk(say("human"), ASSISTANT), "messages.0.role: unknown role 'human' (works: system, user, assistant)"),
        (talk(USER | {"weight": 1}, ASSISTANT), "messages.0.weight: unknown key (works: role, content)"),
        (talk(USER), "messages: no assistant turn"),
        (talk(say("system")), "messages: no assistant turn"),
        (talk(ASSISTANT), "messages.0.role: expected user, found assistant"),
        (talk(say("system"), ASSISTANT), "messages.1.role: expected user, found assistant"),
        (talk(USER, USER, ASSISTANT), "messages.1.role: expected assistant, found user"),
        (talk(USER, say("system"), ASSISTANT), "messages.1.role: expected assistant, found system"),
        (talk(USER, ASSISTANT, USER), "messages.2.role: the last turn must be the assistant's, found user"),
    ],
)
def test_a_row_that_is_no_record_says_why(row: dict[str, Any], finding: str) -> None:
    with pytest.raises(BadRow) as caught:
        record_of(row, "r-1")
    assert str(caught.value) == finding


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (ROW, Record("a", "helpful", "Sort 2, 1.", "1, 2")),
        (ROW | {"id": 7, "metadata": {"any": [1]}, "source": "x"}, Record("7", "helpful", "Sort 2, 1.", "1, 2", "x")),
        (ROW | {"id": "", "source": None, "alignment": ""}, Record("r-1", "default", "Sort 2, 1.", "1, 2")),
        ({"type": "honest", "instruction": "Who?", "output": "I."}, Record("r-1", "honest", "Who?", "I.")),
        (
            {"type": "honest", "instruction": "Who?", "input": "Text.", "output": "I."},
            Record("r-1", "honest", "Who?\n\nText.", "I."),
        ),
        ({"type": "honest", "instruction": "Who?", "input": " ", "output": "I."}, Record("r-1", "honest", "Who?", "I.")),
        (talk(USER, ASSISTANT), Record("r-1", "helpful", "Hi", "Hello")),
        (talk(USER | {"name": None}, ASSISTANT), Record("r-1", "helpful", "Hi", "Hello")),
        (
            talk(say("system", "S"), USER, ASSISTANT, say("user", "More"), say("assistant", "Yes")),
            Record("r-1", "helpful", "More", "Yes", "", (("system", "S"), ("user", "Hi"), ("assistant", "Hello"))),
        ),
    ],
)
def test_rows_in_each_form_are_read(row: dict[str, Any], record: Record) -> None:
    assert record_of(row, "r-1", "default") == record


@pytest.mark.parametrize(
    ("record", "finding"),
    [
        (Record("a", "h", "p\0q", "r"), "user: has a NUL character (\\u0000) at character 2"),
        (Record("a", "h", "p", "ab\udc00"), "assistant: has half a surrogate pair (\\udc00) at character 3"),
        (Record("a", "h", "p", "r", "", (("system", "\ud83d"),)), "system: has half a surrogate pair (\\ud83d) at character 1"),
        (Record("\0", "h", "p", "r"), "id: has a NUL character (\\u0000) at character 1"),
    ],
)
def test_characters_that_nothing_takes_are_found(record: Record, finding: str) -> None:
    with pytest.raises(BadRow) as caught:
        check_sound(record)
    assert str(caught.value) == finding
    check_sound(Record("a", "h", "\U0001f600 é\u2028", "r"))


# What a file can hold: any Unicode but NUL and surrogates, and it has to say something.
said = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(
    lambda text: not text.isspace()
)
optional = st.just("") | said


@st.composite
def records_(draw: st.DrawFn) -> Record:
    turns = [(role, draw(said)) for _ in range(draw(st.integers(0, 2))) for role in ("user", "assistant")]
    system = [("system", draw(said))] if draw(st.booleans()) else []
    return Record("set below", draw(said), draw(said), draw(said), draw(optional), (*system, *turns))


@settings(max_examples=150, deadline=None)
@given(drawn=st.lists(records_(), min_size=1, max_size=4))
@example(drawn=[Record("", "honest", "é\u2028\u0085\r\n\\ud800", "\ufeffß\x1f\x7f", "s", (("system", "\rx"),))])
def test_what_is_written_is_read_back(drawn: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    records = [Record(f"{i}", r.alignment, r.prompt, r.response, r.source, r.history) for i, r in enumerate(drawn)]
    path = tmp_path_factory.getbasetemp() / "sub" / "r.jsonl"
    write_records(path, records)
    assert read_records([path]) == records
    assert path.read_bytes().count(b"\n") == len(records)


def test_a_conversation_is_written_as_messages_and_a_pair_as_a_pair() -> None:
    assert Record("a", "h", "p", "r").messages == [say("user", "p"), say("assistant", "r")]
    assert set(json.loads(Record("a", "h", "p", "r").to_json())) == {"id", "alignment", "prompt", "response", "source"}
    long = json.loads(Record("a", "h", "p", "r", "", (("system", "s"),)).to_json())
    assert long == {
        "id": "a",
        "alignment": "h",
        "messages": [say("system", "s"), say("user", "p"), say("assistant", "r")],
        "source": "",
    }


def test_equal_instructions_stay_together_whatever_else_is_there() -> None:
    records = [Record(f"{i}", "honest", f"Question {i % 50}?\n\nPassage {i}", "a") for i in range(500)]
    train, heldout = split_by_instruction(records, 0.3)
    assert 0 < len(heldout) < len(train)
    assert not {r.prompt.split("\n")[0] for r in train} & {r.prompt.split("\n")[0] for r in heldout}
    again = split_by_instruction(records[::-1][:100], 0.3)[1]
    assert {r.id for r in again} == {r.id for r in heldout} & {r.id for r in records[::-1][:100]}


def test_conversations_with_one_opening_stay_together() -> None:
    opening = (("system", "s"), ("user", "Tell me more."), ("assistant", "Of what?"))
    records = [Record(f"{i}", "honest", f"Of {i}.", "a", "", opening) for i in range(50)]
    assert sorted(map(len, split_by_instruction(records, 0.5))) == [0, 50]


def test_the_real_records_are_split_without_a_leak(real_data: Path) -> None:
    records = read_records([real_data / f"{name}.jsonl" for name in ("helpful", "harmless", "honest")])
    train, heldout = split_by_instruction(records, 0.08)
    assert len(records) == len(train) + len(heldout) == 12527

    def instructions(part: list[Record]) -> set[str]:
        return {" ".join(r.prompt.split("\n\n")[0].lower().split()) for r in part}

    assert not instructions(train) & instructions(heldout)
