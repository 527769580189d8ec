"""A folder that is written file by file and goes on where it was cut off: it appears under its name when it is whole.

`.partial-NAME/` holds the files that are whole and one that may not be; `.partial-NAME.journal` has a line for the work
that it is (`key`) and one for each file that is whole, with what is to be remembered of it. Another key begins anew.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

from h3scale.checkpoint.shards import check_output, put, sync, sync_one
from h3scale.errors import H3Error, OutputError, StorageError


class Work:
    """The folder while it is written. `done`: what was remembered of each whole file, of this process and of those before."""

    def __init__(self, folder: Path, journal: IO[str], done: dict[str, Any], fsync: bool):
        self.folder, self.done, self.fsync = folder, done, fsync
        self._journal = journal

    def unfinished(self, one: str = "unfinished") -> Path:
        """A name for a file while it is written; for one of several, by what it is called."""
        return self.folder / f"{one}.part"  # torch.save wants something before the dot, and puts it into the file

    def finish(self, name: str, remembered: Any, one: str = "unfinished") -> None:
        """The unfinished file is whole and on disk; it gets its name."""
        path = self.folder / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        self.unfinished(one).rename(path)
        if self.fsync:
            sync_one(path.parent)
        self._journal.write(json.dumps([name, path.stat().st_size, remembered]) + "\n")
        self._journal.flush()
        if self.fsync:
            os.fsync(self._journal.fileno())
        self.done[name] = remembered


@contextmanager
def resumed_folder(path: str | Path, key: str, force: bool = False, fsync: bool = True) -> Iterator[Work]:
    """Within, the folder is written; it gets its name when the block ends well.

    What was written stays for the next try when the process is killed, interrupted, or refused by the disk; after a finding
    about the source it is deleted. Raises OutputError (73) when `path` exists and is not to be replaced (`force`), cannot be
    made, or is being written by another process.
    """
    final = Path(path)
    check_output(final, force)
    partial, journal = partial_of(final), final.with_name(f".partial-{final.name}.journal")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lines = journal.open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{final}: cannot be made ({error.strerror})") from error
    with lines:
        _lock(lines, final)
        done = _done(lines, key, partial)
        partial.mkdir(exist_ok=True)
        for path in partial.rglob("*"):
            if path.is_file() and path.relative_to(partial).as_posix() not in done:
                path.unlink()
        try:
            yield Work(partial, lines, done, fsync)
        except H3Error as error:
            if not isinstance(error, StorageError):
                shutil.rmtree(partial, ignore_errors=True)
                journal.unlink(missing_ok=True)
            raise
        if fsync:
            sync(partial)
        if final.exists():
            lines.truncate(0)  # killed while the names are swapped, the next try must not take the old files for its own
        put(partial, final)
        if fsync:
            sync_one(final.absolute().parent)
        for old in final.parent.glob(f".trash-{escape(final.name)}-*"):  # also of a process that was killed here
            shutil.rmtree(old, ignore_errors=True)
        journal.unlink(missing_ok=True)


def check_space(folder: Path, num_bytes: int) -> None:
    """OutputError (73) where so many bytes do not fit beside what is there."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(f"{folder.parent}: {free / 1e9:.2f} GB are free, and {num_bytes / 1e9:.2f} GB are needed")


def partial_of(final: Path) -> Path:
    """Where a folder is while it is written."""
    return final.with_name(f".partial-{final.name}")


def _lock(lines: IO[str], final: Path) -> None:
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{final}: another process is writing it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise


def _done(lines: IO[str], key: str, partial: Path) -> dict[str, Any]:
    """What an earlier process has finished of the same work; else everything begins anew, and the journal with `key`."""
    lines.seek(0)
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
    if entries[:1] != [[key]]:
        shutil.rmtree(partial, ignore_errors=True)
        lines.truncate(0)
        lines.write(json.dumps([key]) + "\n")
        lines.flush()
        return {}
    sizes = {name: size for name, size, _ in entries[1:]}
    whole = {name for name, size in sizes.items() if (partial / name).is_file() and (partial / name).stat().st_size == size}
    return {name: remembered for name, _, remembered in entries[1:] if name in whole}


def _entry(line: str) -> Any:
    """A line of the journal; None for one that was cut off."""
    try:
        return json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return None
