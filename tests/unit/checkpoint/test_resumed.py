"""A consolidation or conversion that is cut off at any moment leaves no half model, and the same call goes on to the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from h3scale.checkpoint import journal, stream
from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.journal import resumed_folder
from h3scale.errors import DataError, OutputError, StorageError
from tests.unit.checkpoint.conftest import with_adam

SHARD_BYTES = 3000  # of a model of 40 kB


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole_shards(out: Path) -> dict[str, int]:
    """Files that the journal calls whole, and which file (inode) each is."""
    path = journal.partial_of(out)
    lines = path.with_name(path.name + ".journal")
    if not lines.is_file():
        return {}
    entries = [json.loads(line) for line in lines.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    return {entry[0]: (path / entry[0]).stat().st_ino for entry in entries}


@pytest.fixture
def checkpoint(shard):
    return shard(world_size=4, ep_size=2, edit=with_adam)


WORKS = {
    "consolidate": lambda source, out: consolidate(source, out, max_shard_bytes=SHARD_BYTES),
    "megablocks": lambda source, out: convert(source, out, to="megablocks", max_shard_bytes=SHARD_BYTES),
    "universal": lambda source, out: convert(source, out, to="universal"),
}


@pytest.mark.parametrize(
    ("work", "tries"),
    [
        ("consolidate", 5),
        ("megablocks", 3),
        ("universal", 2),
        *(pytest.param(work, 50, marks=pytest.mark.slow) for work in WORKS),
    ],
)
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(checkpoint, tmp_path, tries, work):
    write = WORKS[work]
    began = time.monotonic()
    write(checkpoint, tmp_path / "undisturbed")
    duration = time.monotonic() - began
    expected, chance, cut_off = contents(tmp_path / "undisturbed"), random.Random(tries), 0
    for number in range(tries):
        out = tmp_path / f"out-{number}"
        writer = multiprocessing.get_context("fork").Process(target=write, args=(checkpoint, out))
        writer.start()
        time.sleep(chance.uniform(0, duration))
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        if not out.exists():
            before = whole_shards(out)
            cut_off += bool(before)
            write(checkpoint, out)
            assert all((out / name).stat().st_ino == inode for name, inode in before.items())  # none was written again
        assert contents(out) == expected
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial") and not path.is_file()]
    print(f"{cut_off} of {tries} were cut off between shards")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_is_one_line_and_what_is_whole_is_kept(checkpoint, tmp_path, monkeypatch, reason):
    consolidate(checkpoint, tmp_path / "undisturbed", max_shard_bytes=SHARD_BYTES)
    left, allocate = [3], os.posix_fallocate

    def refuse(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(reason, os.strerror(reason))
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=os.strerror(reason)):
        consolidate(checkpoint, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()
    assert len(whole_shards(tmp_path / "out")) == 3
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    consolidate(checkpoint, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_other_options_or_another_source_begin_anew(checkpoint, tmp_path, monkeypatch):
    consolidate(checkpoint, tmp_path / "undisturbed", max_shard_bytes=SHARD_BYTES, dtype=torch.bfloat16)
    write = stream.Writer.write

    def stop_after_two(self, shard, path):
        if shard.name.startswith("model-00003"):
            raise KeyboardInterrupt
        return write(self, shard, path)

    monkeypatch.setattr(stream.Writer, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        consolidate(checkpoint, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert len(whole_shards(tmp_path / "out")) == 2
    monkeypatch.setattr(stream.Writer, "write", write)
    consolidate(checkpoint, tmp_path / "out", max_shard_bytes=SHARD_BYTES, dtype=torch.bfloat16)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    with resumed_folder(tmp_path / "out", "key"), pytest.raises(OutputError, match="another process is writing"):  # noqa: SIM117
        with resumed_folder(tmp_path / "out", "key"):
            pytest.fail("was let in")


def write(out: Path, error: BaseException | None = None) -> None:
    """Two files, of which those that are not there yet are written; then the error."""
    with resumed_folder(out, "key") as work:
        for name in ("a", "b"):
            if name not in work.done:
                work.unfinished().write_text(name)
                work.finish(name, {"of": name})
        work.unfinished().write_text("half")
        if error:
            raise error
        work.unfinished().unlink()


def test_a_journal_whose_last_line_is_torn_is_read_up_to_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", KeyboardInterrupt())
    inode = (tmp_path / ".partial-out" / "a").stat().st_ino
    lines = tmp_path / ".partial-out.journal"
    lines.write_text(lines.read_text()[:-5])
    write(tmp_path / "out")
    assert (tmp_path / "out" / "a").stat().st_ino == inode
    assert contents(tmp_path / "out") == {"a": b"a", "b": b"b"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_right_leaves_nothing(tmp_path):
    with pytest.raises(DataError):
        write(tmp_path / "out", DataError("a shorter file"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(stream.Writer, "write", lambda *arguments: pytest.fail("wrote"))
    with pytest.raises(OutputError, match="GB are free"):
        consolidate(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replacement_that_is_killed_while_names_are_swapped_does_not_take_the_old_files_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with resumed_folder(tmp_path / "out", "the work", force=True) as work:
            if "file" not in work.done:
                work.unfinished().write_text(text)
                work.finish("file", None)

    write("old")
    exchange = journal.put

    def killed(new: Path, old: Path) -> None:
        new.rename(tmp_path / "new")  # as the exchange leaves them
        old.rename(new)
        (tmp_path / "new").rename(old)
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    monkeypatch.setattr(journal, "put", exchange)
    write("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
