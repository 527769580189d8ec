"""Records: one line of JSON each, with its alignment in it. Broken lines are named by file and line, all at once."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from h3scale.errors import DataError, MissingInputError

MAX_SHOWN = 20  # findings printed before "and N more"


@dataclass(frozen=True)
class Record:
    """One instruction and its answer. `alignment` is the label; it is never kept anywhere else."""

    id: str
    alignment: str
    prompt: str
    response: str
    source: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def read_records(paths: Iterable[str | Path], alignments: Sequence[str] | None = None) -> list[Record]:
    """All records of some JSONL files, in file order; with `alignments`, only theirs.

    Two sets of fields are read: `alignment, prompt, response` (`id` and `source` if present), and
    `type, instruction, input, output`, where `input` follows the instruction after an empty line.
    Raises MissingInputError (66) for missing files, DataError (65) for every broken line and for an alignment that has
    no record.
    """
    records: list[Record] = []
    findings: list[str] = []
    seen: dict[str, str] = {}
    missing = [f"{path}: no such file" for path in paths if not Path(path).is_file()]
    if missing:
        raise MissingInputError(missing)
    for path in map(Path, paths):
        for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            where = f"{path}:{number}"
            try:
                record = _parse(line, f"{path.stem}-{number}")
                if record.id in seen:
                    raise ValueError(f"id '{record.id}' was used before, in {seen[record.id]}")
            except ValueError as error:
                findings.append(f"{where}: {error}")
                continue
            seen[record.id] = where
            records.append(record)
    if alignments is not None:
        records = [record for record in records if record.alignment in alignments]
        present = {record.alignment for record in records}
        named = ", ".join(str(path) for path in paths)
        findings += [f"{named}: alignment '{a}' has no records" for a in alignments if a not in present]
    if findings:
        more = [f"and {len(findings) - MAX_SHOWN} more"] if len(findings) > MAX_SHOWN else []
        raise DataError(findings[:MAX_SHOWN] + more)
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """JSONL, by atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")
    partial.replace(path)


def split_by_instruction(records: Sequence[Record], heldout_share: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, held-out), cut by instruction and never by record: equal instructions are always on the same side.

    The instruction is the prompt up to its first empty line. Which side is a hash of (seed, instruction), so it does
    not depend on the order of the records or on the other records.
    """
    train: list[Record] = []
    heldout: list[Record] = []
    for record in records:
        instruction = " ".join(record.prompt.split("\n\n")[0].lower().split())
        digest = hashlib.sha256(f"{seed}:{instruction}".encode()).digest()
        (heldout if int.from_bytes(digest[:8], "big") / 2**64 < heldout_share else train).append(record)
    return train, heldout


def _parse(line: bytes, default_id: str) -> Record:
    if not line.strip():
        raise ValueError("an empty line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at character {error.pos + 1} ({error.msg})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    if "instruction" in value:
        extra = value.get("input") or ""
        fields = {
            "alignment": value.get("type", value.get("alignment")),
            "prompt": f"{_text(value, 'instruction')}\n\n{extra}" if extra else _text(value, "instruction"),
            "response": _text(value, "output"),
        }
    else:
        fields = {key: _text(value, key) for key in ("alignment", "prompt", "response")}
    for key, content in fields.items():
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"'{key}' must be a text that is not empty")
    return Record(str(value.get("id", default_id)), source=str(value.get("source", "")), **fields)


def _text(value: dict[str, Any], key: str) -> Any:
    if key not in value:
        raise ValueError(f"'{key}' is missing (found: {', '.join(value) or 'nothing'})")
    return value[key]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"'{sorted(twice)[0]}' is written twice")
    return dict(pairs)
