"""The prepared store: what is in it and why the rest is not, nothing done twice, nothing lost when killed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from h3scale.config.data import Data
from h3scale.data import prepare as module
from h3scale.data.encode import encode_records
from h3scale.data.loader import TypedLoader
from h3scale.data.prepare import prepare, prepared_folder, relevant_alignments
from h3scale.data.sources import read_records
from h3scale.data.store import open_store
from h3scale.errors import DataError, MissingInputError, OutputError, StorageError
from tests.tiny import WORDS, tiny_tokenizer

ALIGNMENTS = ("helpful", "harmless", "honest")


def line(i: int, **changes: object) -> dict[str, object]:
    words = [WORDS[(i * step + i // 7 + step) % len(WORDS)] for step in (1, 2, 3, 5, 7, 11, 13)]
    record = {
        "id": f"r{i}",
        "alignment": ALIGNMENTS[i % 3],
        "prompt": f"{i} {' '.join(words[:4])}",
        "response": " ".join(words[4:]),
    }
    return {**record, **changes}


def write(path: Path, lines: list) -> Path:
    texts = [text if isinstance(text, bytes) else json.dumps(text).encode() for text in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def recipe(*paths: Path, near: float | None = None, **settings: object) -> Data:
    hygiene = {"near_duplicates": near, **settings.pop("hygiene", {})}  # type: ignore[dict-item]
    return Data.model_validate({"records": [str(path) for path in paths], "hygiene": hygiene, **settings})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_the_store_holds_the_tokens_of_every_record_and_where_it_came_from(tmp_path: Path, tokenizer) -> None:
    one, two = (
        write(tmp_path / "a.jsonl", [line(i) for i in range(40)]),
        write(tmp_path / "b.jsonl", [line(i) for i in range(40, 55)]),
    )
    store = prepare(recipe(one, two), tokenizer, tmp_path / "prepared")
    encoded = encode_records(tokenizer, read_records([one, two]))
    assert len(store) == len(encoded) == 55
    assert store.tokens.dtype == np.uint16
    for i, item in enumerate(encoded):
        begin, end = store.starts[i : i + 2]
        assert (store.tokens[begin:end] & store.id_mask).tolist() == item.input_ids
        assert ((store.tokens[begin:end] >> store.response_bit) == item.tokens >> 31).all()
        assert store.alignments[store.labels[i]] == item.record.alignment
        assert store.responses[i] == item.num_response_tokens
    assert [store.where(i) for i in (0, 39, 40, 54)] == [f"{one}:1", f"{one}:40", f"{two}:1", f"{two}:15"]
    assert store.manifest["counts"]["honest"]["records"] == int((store.labels == 2).sum())
    assert [path.name for path in (tmp_path / "prepared").iterdir() if not path.name.startswith((".lock", "hashes"))] == [
        store.folder.name
    ]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    words = tuple(f"w{i}" for i in range(40_000))
    big = tiny_tokenizer(words=words)
    path = write(tmp_path / "a.jsonl", [line(i, prompt=f"w{39_000 + i}", response="w5") for i in range(6)])
    store = prepare(recipe(path), big, tmp_path / "prepared")
    (item, *_) = encode_records(big, read_records([path]))
    assert store.tokens.dtype == np.uint32
    assert (store.tokens[: store.starts[1]] & store.id_mask).tolist() == item.input_ids


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_LINES", 7)
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(60)])
    stores = [prepare(recipe(path, workers=n, near=0.85), tokenizer, tmp_path / str(n)) for n in (1, 2, 3)]
    assert content(stores[0].folder) == content(stores[1].folder) == content(stores[2].folder)
    assert len({store.folder.name for store in stores}) == 1


def test_preparing_again_reads_nothing(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(20)])
    first = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    monkeypatch.setattr(module, "_prepare", lambda *_: pytest.fail("prepared again"))
    os.utime(path, (1, 1))  # touched, but the same
    assert prepare(recipe(path), tokenizer, tmp_path / "prepared").folder == first.folder
    assert prepare(recipe(path, rows_per_batch=2, sequence_length=99), tokenizer, tmp_path / "prepared").folder == first.folder


def test_a_changed_source_or_tokenizer_is_noticed_and_the_old_store_stays(tmp_path: Path, tokenizer, caplog) -> None:
    caplog.set_level("INFO", logger="h3scale")
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(20)])
    first = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    before = content(first.folder)
    write(path, [line(i) for i in range(21)])
    second = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    assert len(second) == 21
    assert f"{path} changed since {first.folder} was prepared (which stays): preparing anew" in caplog.text
    tokenizer.chat_template += "{# another #}"
    third = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    assert f"tokenizer changed since {second.folder} was prepared" in caplog.text
    assert len({first.folder, second.folder, third.folder}) == 3
    assert content(first.folder) == before


def test_what_is_dropped_is_written_down_with_its_reason(tmp_path: Path, tokenizer) -> None:
    long = " ".join(WORDS[:30])
    lines = [line(i) for i in range(200)]
    lines[10] = line(10, prompt=lines[3]["prompt"], response=lines[3]["response"])  # exact, another alignment
    lines[20] = line(20, prompt=long, response="say1 say2")
    lines[21] = line(21, prompt=long, response="say1 say3")  # nearly
    lines[30] = line(30, id="r5")
    lines[40] = b'{"broken": '
    lines[50] = line(50, prompt="What is the tallest mountain of all?")
    heldout = write(tmp_path / "eval.jsonl", [{"question": "what is the tallest mountain of all"}])
    path = write(tmp_path / "a.jsonl", lines)
    store = prepare(recipe(path, near=0.8, max_bad=0.02, hygiene={"heldout": [str(heldout)]}), tokenizer, tmp_path / "prepared")
    dropped = [json.loads(text) for text in (store.folder / "dropped.jsonl").read_text().splitlines()]
    assert [(item["where"].split(":")[-1], item["why"], item["what"]) for item in dropped] == [
        ("41", "bad", dropped[0]["what"]),
        ("31", "bad", f"its id was used before, in {path}:6"),
        ("51", "heldout", "what is the tallest mountain of all"),
        ("11", "exact_duplicate", f"{path}:4 (harmless here, helpful there)"),
        ("22", "near_duplicate", f"{path}:21 (helpful here, honest there)"),
    ]
    assert dropped[0]["what"].startswith("not valid JSON at character ")
    assert store.manifest["dropped"] == {"bad": 2, "heldout": 1, "exact_duplicate": 1, "near_duplicate": 1}
    assert len(store) == 195
    kept = prepare(recipe(path, max_bad=0.02, hygiene={"exact_duplicates": False}), tokenizer, tmp_path / "prepared")
    assert len(kept) == 198


def test_few_bad_lines_are_dropped_many_stop_and_strict_stops_at_one(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [*[line(i) for i in range(99)], b"\xff\xfe"])
    assert len(prepare(recipe(path), tokenizer, tmp_path / "prepared")) == 99
    with pytest.raises(DataError) as strict:
        prepare(recipe(path, bad_records="stop"), tokenizer, tmp_path / "prepared")
    assert strict.value.findings[0].startswith(f"{path}:100: not valid UTF-8")
    assert strict.value.findings[-1] == "1 of 100 records are bad (1.00%), and data.bad_records is stop"
    with pytest.raises(DataError, match=r"1 of 100 records are bad \(1.00%\), and data.max_bad is 0.50%"):
        prepare(recipe(path, max_bad=0.005), tokenizer, tmp_path / "prepared")
    many = write(tmp_path / "b.jsonl", [*[line(i) for i in range(20)], *[b"{"] * 30])
    with pytest.raises(DataError) as error:
        prepare(recipe(many), tokenizer, tmp_path / "prepared")
    assert len(error.value.findings) == 22
    assert error.value.findings[20].startswith("and 10 more, in ")


def test_nothing_usable_is_an_error(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match="no usable records"):
        prepare(recipe(write(tmp_path / "a.jsonl", [b"{", b"["])), tokenizer, tmp_path / "prepared")
    with pytest.raises(MissingInputError, match=r"nothing\.jsonl"):
        prepare(recipe(tmp_path / "nothing.jsonl"), tokenizer, tmp_path / "prepared")
    path = write(tmp_path / "b.jsonl", [line(1)])
    with pytest.raises(MissingInputError, match=r"eval\.jsonl"):
        prepare(recipe(path, hygiene={"heldout": [str(tmp_path / "eval.jsonl")]}), tokenizer, tmp_path / "prepared")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "a.jsonl", [line(1)])
    with pytest.raises(OutputError, match="cannot be made"):
        prepare(recipe(path), tokenizer, tmp_path / "file" / "prepared")


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_LINES", 5)
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(50)])
    whole = content(prepare(recipe(path), tokenizer, tmp_path / "whole").folder)
    save, calls = np.savez, []

    def full(*arguments, **arrays):
        calls.append(1)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return save(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StorageError, match=r"No space left on device \(what is done is kept; run it again\)"):
        prepare(recipe(path), tokenizer, tmp_path / "prepared")
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))
    assert len(prepare(recipe(path), tokenizer, tmp_path / "prepared")) == 50
    assert len(calls) == 6 + 5
    (folder,) = [path.parent for path in (tmp_path / "prepared").glob("*/manifest.json")]
    assert content(folder) == whole


KILLED = """
import sys
from h3scale.data import prepare as module
from tests.tiny import tiny_tokenizer
from tests.unit.data.test_prepare import recipe
from pathlib import Path
module.BLOCK_LINES = 5
if __name__ == "__main__":
    module.prepare(recipe(Path(sys.argv[1]), workers=int(sys.argv[3]), near=0.9), tiny_tokenizer(), sys.argv[2])
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(400)])
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([*command, str(tmp_path / "whole"), "1"], check=True, env=environment)
    root = tmp_path / "prepared"
    generator = np.random.default_rng(workers)
    for _ in range(3):
        process = subprocess.Popen([*command, str(root), str(workers)], env=environment)
        wanted = len(list(root.glob(".work-*/chunks/[0-9]*"))) + int(generator.integers(3, 20))
        until = time.monotonic() + 60
        while process.poll() is None and len(list(root.glob(".work-*/chunks/[0-9]*"))) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for manifest in root.glob("[0-9a-f]*/manifest.json"):
            open_store(manifest.parent)  # what is visible is whole
    kept = len(list(root.glob(".work-*/chunks/[0-9]*")))
    assert kept > 5 or list(root.glob("*/manifest.json"))
    subprocess.run([*command, str(root), str(workers)], check=True, env=environment)
    (one,) = [p.parent for p in (tmp_path / "whole").glob("*/manifest.json")]
    (two,) = [p.parent for p in root.glob("*/manifest.json")]
    assert content(one) == content(two)
    assert not list(root.glob(".work-*"))
    time.sleep(0.2)
    left = subprocess.run(["pgrep", "-f", str(root)], capture_output=True, text=True, check=False).stdout
    assert left == "", "workers of a killed process live on"


def test_two_that_prepare_the_same_do_it_once(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    calls, prepare_once = [], module._prepare

    def slowly(*arguments):
        calls.append(1)
        time.sleep(0.5)
        prepare_once(*arguments)

    monkeypatch.setattr(module, "_prepare", slowly)
    stores = []
    threads = [
        threading.Thread(target=lambda: stores.append(prepare(recipe(path), tokenizer, tmp_path / "prepared"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3
    assert len(calls) == 1


def test_a_store_that_lost_bytes_is_refused(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    store = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    tokens = store.folder / "tokens.npy"
    size = tokens.stat().st_size
    with tokens.open("r+b") as file:
        file.truncate(size - 3)
    with pytest.raises(DataError, match=rf"tokens\.npy: {size - 3} bytes, the manifest says {size}"):
        open_store(store.folder)
    with pytest.raises(MissingInputError, match="not a prepared store"):
        open_store(tmp_path)


def test_the_alignments_of_a_run(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    data = recipe(path)
    store = prepare(data, tokenizer, tmp_path / "prepared")
    assert relevant_alignments(store, data, None, None) == list(ALIGNMENTS)
    assert relevant_alignments(store, data, None, ["honest", "helpful", "harmless"]) == ["honest", "helpful", "harmless"]
    assert relevant_alignments(store, data, "honest", None) == ["honest"]
    with pytest.raises(DataError, match=r"alignment 'funny' has no records \(found: helpful, harmless, honest\)"):
        relevant_alignments(store, data, "funny", None)
    with pytest.raises(DataError, match=r"alignment 'harmless' is none of the model's \(helpful, honest\)"):
        relevant_alignments(store, data, None, ["helpful", "honest"])


def test_a_misspelt_alignment_is_a_bad_record_or_at_least_a_warning(tmp_path: Path, tokenizer, caplog) -> None:
    path = write(tmp_path / "a.jsonl", [*[line(i) for i in range(900)], line(900, alignment="helpfull")])
    data = recipe(path, alignments=["honest", "harmless", "helpful"])
    store = prepare(data, tokenizer, tmp_path / "prepared")
    assert relevant_alignments(store, data, None, None) == ["honest", "harmless", "helpful"]
    dropped = json.loads((store.folder / "dropped.jsonl").read_text())
    assert dropped["where"] == f"{path}:901"
    assert dropped["what"] == "unknown alignment 'helpfull' (works: honest, harmless, helpful)"
    other = recipe(path)
    names = relevant_alignments(prepare(other, tokenizer, tmp_path / "prepared"), other, None, None)
    assert names == ["helpful", "harmless", "honest", "helpfull"]
    assert f"{path}: only 1 records are 'helpfull': misspelt?" in caplog.text


def test_what_the_tokenizer_was_left_with_changes_no_token(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    first = prepare(recipe(path), tokenizer, tmp_path / "one")
    tokenizer(["ask1", "ask1 ask2 ask3"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation
    second = prepare(recipe(path), tokenizer, tmp_path / "two")
    assert first.folder.name == second.folder.name
    assert content(first.folder) == content(second.folder)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_which_token_is_which_is_part_of_the_store(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "{{ eos_token }}")
    first = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    second = prepare(recipe(path), tokenizer, tmp_path / "prepared")
    assert first.manifest["content"] != second.manifest["content"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    make = module._make_chunks

    def change(*arguments):
        paths = make(*arguments)
        write(path, [line(i) for i in range(31)])
        return paths

    monkeypatch.setattr(module, "_make_chunks", change)
    with pytest.raises(DataError, match="changed while being read"):
        prepare(recipe(path), tokenizer, tmp_path / "prepared")


def test_a_damaged_part_is_made_anew(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    monkeypatch.setattr(module, "assemble", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError):
        prepare(recipe(path), tokenizer, tmp_path / "prepared")
    monkeypatch.undo()
    (chunk,) = (tmp_path / "prepared").glob(".work-*/chunks/*.npz")
    chunk.write_bytes(b"")
    with pytest.raises(StorageError, match="a damaged part"):
        prepare(recipe(path), tokenizer, tmp_path / "prepared")
    assert len(prepare(recipe(path), tokenizer, tmp_path / "prepared")) == 30


def test_other_processes_open_store_and_plan_themselves(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(300)])
    data = recipe(path, sequence_length=64, rows_per_batch=4)
    loading = TypedLoader(prepare(data, tokenizer, tmp_path / "prepared"), data, seed=0, steps=50, alignments=["honest", "helpful"])
    copied = pickle.dumps(loading.records)
    assert len(copied) < 500
    again = pickle.loads(copied)
    assert (again.labels == loading.records.labels).all()
    assert again.alignments == ("honest", "helpful")
    assert len(pickle.dumps(loading.plan)) < 500
    assert (pickle.loads(pickle.dumps(loading.plan)).records == loading.plan.records).all()


def test_a_damaged_plan_is_not_trained_on(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    data = recipe(path, sequence_length=64, rows_per_batch=2)
    store = prepare(data, tokenizer, tmp_path / "prepared")
    TypedLoader(store, data, seed=0, steps=5)
    (records,) = (store.folder / "plans").glob("*/5/records.u32")
    with records.open("r+b") as file:
        file.truncate(16)
    with pytest.raises(DataError, match="damaged, 4 of "):
        TypedLoader(store, data, seed=0, steps=5)


def test_where_stores_are() -> None:
    data = Data.model_validate({"records": ["x"]})
    assert prepared_folder(data, "models/fused") == Path("models/prepared")
    assert prepared_folder(data.model_copy(update={"prepared": "p"}), "models/fused") == Path("p")


def test_where_a_plan_cannot_be_kept_it_is_made_in_memory(tmp_path: Path, tokenizer, caplog) -> None:
    path = write(tmp_path / "a.jsonl", [line(i) for i in range(30)])
    data = recipe(path, sequence_length=64, rows_per_batch=2)
    store = prepare(data, tokenizer, tmp_path / "prepared")
    kept = TypedLoader(store, data, seed=0, steps=5)
    assert [p.name for p in (store.folder / "plans" / kept.fingerprint).iterdir()] == ["5"]
    shutil.rmtree(store.folder / "plans")
    (store.folder / "plans").write_text("in the way")
    loading = TypedLoader(store, data, seed=0, steps=5)
    assert "the plan cannot be kept" in caplog.text
    assert [loading.batch(s).records.tolist() for s in range(5)] == [kept.batch(s).records.tolist() for s in range(5)]


def test_the_order_does_not_change_when_records_move(tmp_path: Path, tokenizer) -> None:
    one, two = (write(tmp_path / name, [line(i) for i in range(30)]) for name in ("a.jsonl", "b.jsonl"))
    stores = [prepare(recipe(path), tokenizer, tmp_path / "prepared") for path in (one, two)]
    assert stores[0].folder != stores[1].folder  # each says where its records are
    orders = [TypedLoader(store, recipe(one, sequence_length=64), seed=0).fingerprint for store in stores]
    assert orders[0] == orders[1]
