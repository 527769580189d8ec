"""Sources: every format gives the same records, every fault its line with the place, and memory stays bounded."""

import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h3scale.config.data import Source
from h3scale.data import sources, tables
from h3scale.data.lines import MAX_LINE_BYTES, read_lines
from h3scale.data.parts import Part, parts_of
from h3scale.data.records import Record
from h3scale.data.sources import Block, blocks, parse_block, read_records
from h3scale.errors import ConfigError, DataError, H3Error, MissingInputError

ROW = {"id": "a", "alignment": "helpful", "prompt": "Sort 2, 1.", "response": "1, 2"}
RECORD = Record("a", "helpful", "Sort 2, 1.", "1, 2")


def line(**changes: object) -> bytes:
    return json.dumps(ROW | changes, ensure_ascii=False).encode() + b"\n"


def put(folder: Path, content: bytes, name: str = "r.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(folder: Path, rows: list[dict[str, Any]], name: str = "r.parquet") -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def findings(kind: type[H3Error], *named: str | Path | Source) -> list[str]:
    with pytest.raises(kind) as caught:
        read_records(named)
    assert type(caught.value) is kind
    assert all("\n" not in finding for finding in caught.value.findings)
    return caught.value.findings


# --- JSON lines ---


def test_all_bad_lines_are_named_by_file_and_line_at_once(tmp_path: Path) -> None:
    path = put(tmp_path, b"{\n" + line() + b"\n[]\n" + line(id="b", prompt=3) + line(id="c", response=None) + line() + b'{"id": "x')
    assert findings(DataError, path) == [
        f"{path}:1: not valid JSON at character 3 (Expecting property name enclosed in double quotes)",
        f"{path}:4: expected a JSON object, found list",
        f"{path}:5: prompt: expected a text, found int",
        f"{path}:6: response: expected a text, found null",
        f"{path}:7: id 'a' was used before, in {path}:2",
        f"{path}:8: not valid JSON at character 8 (Unterminated string starting at; the line has no end: the file was cut off)",
    ]


def test_the_first_findings_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    path = put(tmp_path, b"7\n" * 50)
    found = findings(DataError, path)
    assert len(found) == 21
    assert found[19:] == [f"{path}:20: expected a JSON object, found int", "and 30 more"]


@pytest.mark.parametrize(
    ("escape", "finding"),
    [
        (rb"p\u0000q", "user: has a NUL character (\\u0000) at character 2"),
        (rb"\ud83d alone", "user: has half a surrogate pair (\\ud83d) at character 1"),
        (rb"\ude00", "user: has half a surrogate pair (\\ude00) at character 1"),
    ],
)
def test_escapes_that_no_text_can_hold_are_found(tmp_path: Path, escape: bytes, finding: str) -> None:
    path = put(tmp_path, b'{"alignment": "helpful", "prompt": "' + escape + b'", "response": "r"}\n')
    assert findings(DataError, path) == [f"{path}:1: {finding}"]


def test_marks_blanks_and_line_separators_are_accepted_and_shift_no_number(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + line().replace(b"\n", b"\r\n") + b"\r\n \t\n\n" + line(id=None, prompt="a\u2028b\u0085c") + b"\n"
    content += rb'{"alignment": "helpful", "prompt": "\ud83d\ude00", "response": "r"}'
    path = put(tmp_path, content)
    expected = [RECORD, Record("r-5", "helpful", "a\u2028b\u0085c", "1, 2"), Record("r-7", "helpful", "\U0001f600", "r")]
    assert read_records([path]) == expected
    assert [parse_block(block).places for block in blocks(parts_of([path])[0], 2)] == [[1], [], [5], [7]]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_records_is_told(tmp_path: Path, content: bytes) -> None:
    path, packed = put(tmp_path, content), put(tmp_path, gzip.compress(content), "p.jsonl.gz")
    assert findings(DataError, path, packed) == [f"{path}: no records", f"{packed}: no records"]


def test_a_line_that_is_too_long_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * (40 * 2**20) + b'"}'
    path = put(tmp_path, line() + long + b"\n" + b"{\n" + long)
    expected = f"a line of {len(long):,} bytes (works: at most 16,777,216)"
    tracemalloc.start()
    found = findings(DataError, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [
        f"{path}:2: {expected}",
        f"{path}:3: not valid JSON at character 3 (Expecting property name enclosed in double quotes)",
        f"{path}:4: {expected}",
    ]
    assert peak < 2.5 * MAX_LINE_BYTES


def test_the_longest_line_is_still_read(tmp_path: Path) -> None:
    full = b"x" * MAX_LINE_BYTES
    assert [len(read) for read in read_lines(str(put(tmp_path, full + b"\n" + full)), False)] == [
        MAX_LINE_BYTES + 1,
        MAX_LINE_BYTES,
    ]
    (over,) = read_lines(str(put(tmp_path, full + b"x\n")), False)
    assert over == f"a line of {MAX_LINE_BYTES + 1:,} bytes (works: at most 16,777,216)"


def test_blocks_are_bounded_by_lines_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = parts_of([put(tmp_path, b"".join(line(id=i) for i in range(10)))])
    assert [(block.first, len(block.lines)) for block in blocks(part, 4)] == [(1, 4), (5, 4), (9, 2)]
    monkeypatch.setattr(sources, "MAX_BLOCK_BYTES", 3 * len(line(id=0)))
    assert [(block.first, len(block.lines)) for block in blocks(part, 4)] == [(1, 3), (4, 3), (7, 3), (10, 1)]
    assert [r.id for block in blocks(part, 4) for r in parse_block(block).records] == [str(i) for i in range(10)]


def test_blocks_and_what_is_parsed_of_them_travel_to_workers(tmp_path: Path) -> None:
    (block,) = blocks(parts_of([put(tmp_path, line() + b"{\n")])[0])
    assert pickle.loads(pickle.dumps(block)) == block
    assert pickle.loads(pickle.dumps(parse_block(block))) == parse_block(block)


def test_a_source_names_the_alignment_of_rows_that_have_none(tmp_path: Path) -> None:
    path = put(tmp_path, line() + b'{"prompt": "p", "response": "r"}\n')
    assert [r.alignment for r in read_records([Source(path=str(path), alignment="honest")])] == ["helpful", "honest"]


def test_only_the_wanted_alignments_are_given_and_missing_ones_told(tmp_path: Path) -> None:
    path = put(tmp_path, line() + line(id="b", alignment="honest"))
    assert [record.id for record in read_records([path], ["honest"])] == ["b"]
    with pytest.raises(DataError) as caught:
        read_records([path], ["helpful", "harmless"])
    assert caught.value.findings == [f"{path}: alignment 'harmless' has no records"]


# --- packed, and other endings ---


def test_packed_lines_are_read(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(line(), mtime=0) + gzip.compress(line(id=None)), "r.jsonl.gz")
    assert read_records([path]) == [RECORD, Record("r-2", "helpful", "Sort 2, 1.", "1, 2")]


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("r.jsonl", gzip.compress(line(), mtime=0), "a gzip file with another ending (works: a name that ends with .jsonl.gz)"),
        ("r.csv", gzip.compress(b"a,b\n", mtime=0), "a gzip file with another ending (works: a name that ends with .jsonl.gz)"),
        ("r.jsonl", b"PAR1....PAR1", "a Parquet file with another ending (works: a name that ends with .parquet)"),
        ("r.jsonl.gz", line(), "not a gzip file (works: a name that ends with .jsonl, if it is not packed)"),
        ("r.jsonl.gz", gzip.compress(line() * 99, mtime=0)[:-9], "the gzip stream has no end: the file was cut off"),
        ("r.parquet", b"", "not a whole Parquet file (Parquet file size is 0 bytes)"),
        (
            "r.parquet",
            line(),
            "not a whole Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
            "parquet file)",
        ),
        ("r.csv", b"", "no records"),
        ("r.csv", b"prompt,response\n", "no records"),
        ("r.csv", b"prompt,prompt\n1,2\n", "column 'prompt' is there twice"),
        ("r.csv", b"prompt\n\xff\n", "not valid UTF-8 (works: UTF-8)"),
        (
            "r.csv",
            b"a,b\n1,2\n1,2,3\n",
            "not a whole CSV file (Error tokenizing data. C error: Expected 2 fields in line 3, saw 3)",
        ),
        ("r.csv", b'a,b\n1,"2\n', "not a whole CSV file (Error tokenizing data. C error: EOF inside string starting at row 1)"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, capfd: Any, name: str, content: bytes, finding: str) -> None:
    path = put(tmp_path, content, name)
    assert findings(DataError, path) == [f"{path}: {finding}"]
    assert capfd.readouterr() == ("", "")


def test_damage_inside_a_packed_file_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(2000)]
    parquet = table(tmp_path, rows)
    content = bytearray(parquet.read_bytes())
    content[8:400] = b"\xff" * 392
    parquet.write_bytes(content)
    packed = bytearray(gzip.compress(b"".join(line(id=i, prompt=os.urandom(20).hex()) for i in range(500))))
    packed[3000:3100] = b"\xff" * 100
    path = put(tmp_path, bytes(packed), "r.jsonl.gz")
    found = findings(DataError, Source(path=str(parquet), alignment="x"), path)
    assert found[0].startswith(f"{parquet}: not a whole Parquet file (")
    assert found[1].startswith(f"{path}: ")
    assert len(found) == 2


# --- tables ---


def test_bad_lines_up_to_a_share_are_left_out_and_one_more_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [line(id=str(i)) for i in range(8)]
    path = put(tmp_path, b"".join([*rows[:4], line(id="0"), *rows[4:], line(id="8", prompt=5)]))
    with pytest.raises(DataError) as caught:
        read_records([path], max_bad=0.19)
    assert len(caught.value.findings) == 2
    with caplog.at_level("WARNING", logger="h3scale"):
        assert [record.id for record in read_records([path], max_bad=0.2)] == [str(i) for i in range(8)]
    assert f"2 bad records left out, such as {path}:5: id '0' was used before" in caplog.text


def test_parquet_rows_are_records_and_bad_ones_have_their_row(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    good = table(tmp_path, [{"alignment": "x", "messages": talk, "id": None}], "with [1] brackets.parquet")
    assert read_records([good]) == [Record("with [1] brackets-1", "x", "Hi", "Hello")]
    bad = table(tmp_path, [ROW, ROW | {"prompt": None}, ROW, ROW | {"id": "n", "prompt": "\0"}], "bad.parquet")
    assert findings(DataError, bad) == [
        f"{bad}:row 2: prompt: expected a text, found null",
        f"{bad}:row 3: id 'a' was used before, in {bad}:row 1",
        f"{bad}:row 4: user: has a NUL character (\\u0000) at character 1",
    ]


def test_cells_of_a_csv_stay_texts(tmp_path: Path) -> None:
    text = '\ufeffid,alignment,prompt,response\n007,x,123,1.50\n,x,"a\nb",NA\n,x,null,"say ""no"""\n9,x,True,\n'
    path = put(tmp_path, text.encode(), "c*.csv")
    assert findings(DataError, path) == [f"{path}:row 4: response: is empty"]
    path = put(tmp_path, b"alignment,prompt,response\nx,cut", "c*.csv")
    assert findings(DataError, path) == [f"{path}:row 1: response: is empty"]
    path = put(tmp_path, text.rsplit("9", 1)[0].encode(), "c*.csv")
    assert read_records([path]) == [
        Record("007", "x", "123", "1.50"),
        Record("c*-2", "x", "a\nb", "NA"),
        Record("c*-3", "x", "null", 'say "no"'),
    ]


def test_tables_are_streamed_in_blocks_with_their_row_numbers(tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": f"p{i}", "response": "r"} for i in range(25)])
    (part,) = parts_of([Source(path=str(path), alignment="x")])
    found = list(blocks(part, 10))
    assert [(block.first, len(block.lines)) for block in found] == [(1, 10), (11, 10), (21, 5)]
    assert next((r.id, r.prompt) for r in parse_block(found[2]).records) == ("r-21", "p20")


def test_reading_a_table_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert read_records([table(tmp_path, [ROW])]) == [RECORD]
    assert not (tmp_path / "cache").exists()


def test_nothing_heavy_is_imported_before_a_table_is_read(tmp_path: Path) -> None:
    code = "import sys, h3scale.data.sources as s; s.read_records(sys.argv[1:]); print({'torch', 'datasets'} & {*sys.modules})"
    put(tmp_path, line())
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.jsonl")], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- which files ---


def test_a_folder_gives_its_record_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", ".partial-c.jsonl", "notes.txt", "sub/z.jsonl"):
        put(tmp_path, line(), name)
    put(tmp_path, gzip.compress(line()), "c.jsonl.gz")
    parts = parts_of([tmp_path])
    assert [(Path(part.path).name, part.kind) for part in parts] == [
        ("a.jsonl", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("c.jsonl.gz", "jsonl.gz"),
    ]


def test_what_is_not_there_or_no_file_is_told_at_once_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    put(empty, b"", ".hidden.jsonl")
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
        named = [tmp_path / name for name in ("x.jsonl", "empty", "fifo.jsonl", "socket.jsonl", "gone.jsonl", "self.jsonl")]
        assert findings(MissingInputError, *named, "/dev/zero", "", "a\0b") == [
            f"{tmp_path}/x.jsonl: no such file",
            f"{tmp_path}/empty: a folder without record files (works: .jsonl.gz, .jsonl, .parquet, .csv)",
            f"{tmp_path}/fifo.jsonl: not a regular file",
            f"{tmp_path}/socket.jsonl: not a regular file",
            f"{tmp_path}/gone.jsonl: no such file",
            f"{tmp_path}/self.jsonl: no such file",
            "/dev/zero: not a regular file",
            "'': no such file",
            "a\0b: no such file",
        ]
        in_folder = findings(MissingInputError, tmp_path)
        assert in_folder == [
            f"{tmp_path}/{name}.jsonl: {what}"
            for name, what in zip(
                ("fifo", "gone", "self", "socket"),
                ("not a regular file", "no such file", "no such file", "not a regular file"),
                strict=True,
            )
        ]


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    files = [put(tmp_path, line(), name) for name in ("r.jsonl", "r.csv")]
    monkeypatch.setattr(Path, "open", refuse)
    for path in files:
        assert findings(MissingInputError, path) == [f"{path}: cannot be read (Permission denied)"]


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, line())
    (tmp_path / "link.jsonl").symlink_to(path)
    assert findings(ConfigError, path, path) == [f"{path}: named twice"]
    assert findings(ConfigError, path, tmp_path / "link.jsonl") == [f"{tmp_path}/link.jsonl: named twice, before as {path}"]
    assert findings(ConfigError, "hub:a/b", "hub:a/b") == ["hub:a/b: named twice"]
    cut = [Source(path=str(path), adapter="truthfulqa/truthful_qa", part=part) for part in ("train", "heldout")]
    assert len(parts_of(cut)) == 2


def test_files_of_one_name_give_different_ids(tmp_path: Path) -> None:
    row = line(id=None)
    named = [put(tmp_path, row, name) for name in ("a/train.jsonl", "b/train.jsonl", "b/test.jsonl", "b/train.csv")]
    named[3].write_text("alignment,prompt,response\nx,p,r\n")
    assert [part.stem for part in parts_of(named)] == ["a/train", str(named[1]), "test", str(named[3])]
    assert len({record.id for record in read_records(named)}) == 4


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        (
            Source(path="r.jsonl", adapter="beavertails"),
            "adapter: unknown adapter 'beavertails' (did you mean 'PKU-Alignment/BeaverTails'?)",
        ),
        (Source(path="r.jsonl", adapter="alpaca"), "alignment: adapter 'alpaca' has none of its own (works: alignment: NAME)"),
        (Source(path="r.jsonl", split="test"), "split: only a hub data set has splits (works: the file of one split)"),
        (Source(path="r.jsonl", part="train"), "part: 'train' needs an adapter with a cut (works: truthfulqa/truthful_qa)"),
        (
            Source(path="hub:truthfulqa/truthful_qa"),
            "part: adapter 'truthfulqa/truthful_qa' needs a side of its cut (works: part: train, part: heldout)",
        ),
        (
            Source(path="hub:truthfulqa/truthful_qa", split="train", part="train"),
            "split: 'train' is none of this set's (works: validation)",
        ),
        (Source(path="hub:truthful_qa"), "expected hub:OWNER/NAME"),
    ],
)
def test_sources_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source, finding: str) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, line())
    assert findings(ConfigError, source) == [f"{source.path}: {finding}"]


# --- the hub ---


def test_a_hub_set_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert findings(MissingInputError, "hub:tatsu-lab/alpaca") == [
        "hub:tatsu-lab/alpaca: cannot be read (Couldn't reach 'tatsu-lab/alpaca' on the Hub (OfflineModeIsEnabled); "
        "works: a local copy, path: FILE, adapter: tatsu-lab/alpaca)"
    ]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:PKU-Alignment/BeaverTails", ("PKU-Alignment/BeaverTails", None, None, "30k_train")),
        (Source(path="hub:PKU-Alignment/BeaverTails", split="330k_test"), ("PKU-Alignment/BeaverTails", None, None, "330k_test")),
        ("hub:Anthropic/hh-rlhf", ("Anthropic/hh-rlhf", None, "harmless-base", "train")),
        (Source(path="hub:Anthropic/hh-rlhf/helpful-base", split="test"), ("Anthropic/hh-rlhf", None, "helpful-base", "test")),
        (
            Source(path="hub:truthfulqa/truthful_qa", part="heldout"),
            ("truthfulqa/truthful_qa", "generation", None, "validation"),
        ),
        (Source(path="hub:me/mine", split="x"), ("me/mine", None, None, "x")),
    ],
)
def test_a_hub_set_is_asked_for_as_its_adapter_says(
    monkeypatch: pytest.MonkeyPatch, source: str | Source, asked: tuple[str | None, ...]
) -> None:
    calls = []

    def load(path: str, *, name: str | None, data_dir: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((path, name, data_dir, split))
        return [{"question": "q"}]

    monkeypatch.setattr(tables, "_load", load)
    (part,) = parts_of([source])
    assert sum(len(block.lines) for block in blocks(part)) == 1
    assert calls == [asked]


def test_rows_of_a_hub_set_are_records_and_two_splits_differ_in_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "p", "response": "r", "is_safe": safe, "category": {}} for safe in (False, True)]
    monkeypatch.setattr(tables, "_load", lambda path, **options: iter(rows))
    named = [Source(path="hub:PKU-Alignment/BeaverTails", split=split) for split in ("30k_train", "30k_test")]
    name = "PKU-Alignment/BeaverTails"
    assert read_records(named) == [
        Record(f"BeaverTails-{split}-2", "harmless", "p", "r", name) for split in ("30k_train", "30k_test")
    ]
    (part,) = parts_of(named[:1])
    assert part.where(3) == "hub:PKU-Alignment/BeaverTails:row 3"


def test_a_set_with_a_cut_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CUT_ROWS", 2)
    path = put(tmp_path, b'{"question": "q"}\n' * 3)
    assert findings(DataError, Source(path=str(path), adapter="truthfulqa/truthful_qa", part="train")) == [
        f"{path}: more than 2 rows, too many to be cut by likeness of question"
    ]


def test_lines_of_the_other_side_keep_the_numbers() -> None:
    part = Part("t.jsonl", "jsonl", "truthfulqa/truthful_qa", "honest", part="train", stem="t")
    row = {"question": "q", "best_answer": "a", "correct_answers": ["a"]}
    parsed = parse_block(Block(part, 5, [None, json.dumps(row).encode(), b"\n", None]))
    assert (parsed.places, parsed.filtered, parsed.records[0].id) == ([6], 2, "t-6")
