"""Records: one line of JSON each, with its alignment in it. What is wrong with a line is said in one clause."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Turn = tuple[str, str]  # (role, content)
Row = Mapping[str, Any]

COMMON = ("id", "alignment", "type", "source", "metadata")
FORMS = {"messages": ("messages",), "instruction": ("instruction", "input", "output"), "prompt": ("prompt", "response")}
KNOWN = {form: frozenset((*COMMON, *keys)) for form, keys in FORMS.items()}
ROLES = ("system", "user", "assistant")


class BadRow(ValueError):
    """What is wrong with one line or row, without its place: the caller knows that."""


@dataclass(frozen=True)
class Record:
    """One conversation, trained on its last answer. `alignment` is the label; it is never kept anywhere else.

    prompt: the last user turn. response: the last assistant turn. history: the turns before those two, oldest first.
    """

    id: str
    alignment: str
    prompt: str
    response: str
    source: str = ""
    history: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = (*self.history, ("user", self.prompt), ("assistant", self.response))
        return [{"role": role, "content": content} for role, content in turns]

    def to_json(self) -> str:
        said = {"messages": self.messages} if self.history else {"prompt": self.prompt, "response": self.response}
        return json.dumps({"id": self.id, "alignment": self.alignment, **said, "source": self.source}, ensure_ascii=False)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """JSONL, by atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(record.to_json() + "\n" for record in records)
    partial.replace(path)


def split_by_instruction(records: Sequence[Record], heldout_share: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, held-out), cut by instruction and never by record: equal instructions are always on the same side.

    The instruction is what the conversation's first user turn says up to its first empty line. Which side is a hash of
    (seed, instruction), so it does not depend on the order of the records or on the other records.
    """
    train: list[Record] = []
    heldout: list[Record] = []
    for record in records:
        opening = next((content for role, content in record.history if role == "user"), record.prompt)
        instruction = " ".join(opening.split("\n\n")[0].lower().split())
        digest = hashlib.sha256(f"{seed}:{instruction}".encode()).digest()
        (heldout if int.from_bytes(digest[:8], "big") / 2**64 < heldout_share else train).append(record)
    return train, heldout


def without_sources(records: Sequence[Record], texts: Sequence[str]) -> list[Record]:
    """Those that are not `of_source`."""
    return [record for record in records if not of_source(record.source, texts)]


def of_source(source: str, texts: Sequence[str]) -> bool:
    """Whether a record's `source` has one of these texts in it, small or capital."""
    return any(text.lower() in source.lower() for text in texts)


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line, which still has its line end if the file has one there. Raises BadRow."""
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except BadRow:
        raise
    except RecursionError:
        raise BadRow("nested too deeply (works: messages and metadata of a few levels)") from None
    except ValueError as error:
        raise BadRow(_malformed(line, error)) from None
    if type(value) is not dict:
        raise BadRow(f"expected a JSON object, found {kind_of(value)}")
    return value


def record_of(row: Row, default_id: str, alignment: str | None = None) -> Record:
    """A record from our own fields; `alignment` is for rows that name none. Raises BadRow with the first thing that is wrong.

    Texts: `prompt, response`, or `instruction, output` with `input` after an empty line, or `messages`. Beside them:
    `id`, `alignment` (or `type`), `source`, and `metadata`, which may be anything and is not kept. A null or empty id,
    alignment, source or input counts as none.
    """
    form = "messages" if "messages" in row else "instruction" if "instruction" in row or "output" in row else "prompt"
    if not row.keys() <= KNOWN[form]:
        _refuse_key(row, form)
    history: tuple[Turn, ...] = ()
    if form == "prompt":
        prompt, response = text_of(row, "prompt"), text_of(row, "response")
    elif form == "instruction":
        prompt, response = joined(text_of(row, "instruction"), optional_text(row, "input")), text_of(row, "output")
    else:
        history, prompt, response = conversation(turns_of(row["messages"], "messages"), "messages")
    return Record(_id(row, default_id), _alignment(row, alignment), prompt, response, optional_text(row, "source"), history)


def check_sound(record: Record) -> None:
    """Raises BadRow for characters that no tokenizer and no file takes: NUL, and halves of surrogate pairs.

    Valid UTF-8 has no surrogates and valid JSON no raw NUL, so a line without an escape has no need of this.
    """
    fields = [("id", record.id), ("alignment", record.alignment), ("source", record.source)]
    fields += [(message["role"], message["content"]) for message in record.messages]
    for name, text in fields:
        if "\0" in text:
            raise BadRow(f"{name}: has a NUL character (\\u0000) at character {text.index(chr(0)) + 1}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise BadRow(f"{name}: has half a surrogate pair ({half}) at character {error.start + 1}") from None


def turns_of(messages: Any, name: str) -> list[Turn]:
    """The turns of a list of messages, in any order; `name` is what findings call it. Raises BadRow."""
    if type(messages) is not list:
        raise BadRow(f"{name}: expected a list, found {kind_of(messages)}")
    return [_turn(message, f"{name}.{index}") for index, message in enumerate(messages)]


def conversation(turns: Sequence[Turn], name: str) -> tuple[tuple[Turn, ...], str, str]:
    """(history, prompt, response) of user and assistant in turn, the assistant last; a system turn may begin. Raises BadRow."""
    if not turns:
        raise BadRow(f"{name}: is empty")
    if all(role != "assistant" for role, _ in turns):
        raise BadRow(f"{name}: no assistant turn")
    start = int(turns[0][0] == "system")
    for index, (role, _) in enumerate(turns[start:]):
        expected = ROLES[1 + index % 2]
        if role != expected:
            raise BadRow(f"{name}.{start + index}.role: expected {expected}, found {role}")
    if turns[-1][0] != "assistant":
        raise BadRow(f"{name}.{len(turns) - 1}.role: the last turn must be the assistant's, found {turns[-1][0]}")
    return tuple(turns[:-2]), turns[-2][1], turns[-1][1]


def text_of(row: Row, key: str, where: str = "") -> str:
    """A text that is there and says something; `where` is what precedes the key in the finding."""
    if key not in row:
        raise BadRow(f"{where}{key}: is missing (found: {names_of(row)})")
    value = row[key]
    if type(value) is not str:
        raise BadRow(f"{where}{key}: expected a text, found {kind_of(value)}")
    if not value or value.isspace():
        raise BadRow(f"{where}{key}: is empty")
    return value


def optional_text(row: Row, key: str) -> str:
    """A text, or "" where it is absent, null or blank."""
    value = row.get(key)
    if value is None:
        return ""
    if type(value) is not str:
        raise BadRow(f"{key}: expected a text, found {kind_of(value)}")
    return "" if value.isspace() else value


def joined(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def names_of(row: Row) -> str:
    """The keys of a row for a finding: on one line, whatever is in them, and not too many."""
    names = [shown(key) for key in list(row)[:12]]
    return ", ".join([*names, "..."] if len(row) > 12 else names) or "nothing"


def shown(text: str) -> str:
    """As it can be printed on one line."""
    return repr(text)[1:-1] if len(text) <= 40 else repr(text[:40])[1:-1] + "..."


def _turn(message: Any, where: str) -> Turn:
    if type(message) is not dict:
        raise BadRow(f"{where}: expected an object with role and content, found {kind_of(message)}")
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:  # a table has every column in every row
            raise BadRow(f"{where}.{shown(key)}: unknown key (works: role, content)")
    role = text_of(message, "role", f"{where}.")
    if role not in ROLES:
        raise BadRow(f"{where}.role: unknown role '{shown(role)}' (works: {', '.join(ROLES)})")
    return role, text_of(message, "content", f"{where}.")


def _id(row: Row, default: str) -> str:
    value = row.get("id")
    if type(value) is int:
        return str(value)
    if value is not None and type(value) is not str:
        raise BadRow(f"id: expected a text or a whole number, found {kind_of(value)}")
    return value if value and not value.isspace() else default


def _alignment(row: Row, default: str | None) -> str:
    named, typed = optional_text(row, "alignment"), optional_text(row, "type")
    if named and typed and named != typed:
        raise BadRow(f"type: '{shown(typed)}' differs from alignment '{shown(named)}' (works: one of the two)")
    alignment = named or typed or default
    if not alignment:
        raise BadRow(f"alignment: is missing (found: {names_of(row)}; works too: alignment of the whole source)")
    return alignment


def _refuse_key(row: Row, form: str) -> NoReturn:
    known = [key for key in (*FORMS[form], *COMMON)]
    key = next(key for key in row if key not in known)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"works: {', '.join(known)}"
    raise BadRow(f"{shown(key)}: unknown key ({hint})")


def _malformed(line: bytes, error: ValueError) -> str:
    if b"\0" in line:
        return f"a NUL byte at byte {line.index(0) + 1} (the file was damaged, as by a crash)"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 at byte {error.start + 1}"
    if not isinstance(error, json.JSONDecodeError):  # int() refuses thousands of digits
        return "a number with too many digits"
    cut = "" if line.endswith(b"\n") else "; the line has no end: the file was cut off"
    array = "; works: an object on each line, not one array" if line.startswith(b"[") else ""
    return f"not valid JSON at character {error.pos + 1} ({error.msg}{cut}{array})"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRow(f"{shown(twice)}: is written twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BadRow(f"{name} is not JSON (works: a number or null)")


# Made once: json.loads with arguments would make a decoder for every line.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
