"""A rank's files of a checkpoint that is being made: flushed and hashed by whoever wrote them, and known to all ranks then.

On shared file systems (NFS) a rank need not see what another one has just written, nor can it flush it.
"""

import hashlib
import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from h3scale.checkpoint.shards import sync_one, write_all
from h3scale.errors import StorageError
from h3scale.train.storage import writing

Entries = dict[str, dict[str, Any]]


class OwnFiles:
    """What this rank writes into a checkpoint's `folder`.

    A write that fails is remembered, and told when all ranks agree: until then every rank goes on as the others do, which
    would else wait for it in a collective. `staged`: what the engine saves is copied to memory, and written by a thread after
    `start`.
    """

    def __init__(self, folder: Path, staged: bool = False):
        self.folder = folder
        self.paths: list[Path] = []
        self.findings: list[str] = []
        self.copies: dict[Path, io.BytesIO] | None = {} if staged else None
        self.entries: Entries = {}
        self.writer = threading.Thread(target=self._write_all, daemon=True)  # a run that fails does not wait for it
        self.failed: BaseException | None = None

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """Lets `write` make a file, or the files of a folder that is there; not after a write has failed."""
        if self.findings:
            return
        try:
            with writing(path):
                write(path)
        except StorageError as error:
            self.findings += error.findings
        self.paths.append(path)

    @contextmanager
    def of_deepspeed(self, engine: Any) -> Iterator[None]:
        """Within, what the engine saves is written here. Its scripts are left out: they refuse these very files."""
        saver = engine.checkpoint_engine
        plain = saver.save

        def save(state_dict: Any, path: str) -> None:
            if self.copies is None:
                self.write(Path(path), lambda target: plain(state_dict, str(target)))
            else:
                plain(state_dict, self.copies.setdefault(Path(path), io.BytesIO()))

        saver.save = save
        engine._copy_recovery_script = lambda _folder: None
        try:
            yield
        finally:
            del saver.save, engine._copy_recovery_script  # the classes' own come to light again

    def start(self) -> None:
        """Begins to write what is staged, and to flush and hash all of it, beside whatever the caller does."""
        self.writer.start()

    def is_writing(self) -> bool:
        return self.writer.is_alive()

    def agreed(self) -> Entries:
        """Size and sha256 of every rank's files, by their names; they are on disk then. Every rank calls this.

        StorageError (74) on all ranks where one could not write, with what each one says.
        """
        if self.writer.ident is None:
            self._write_all()
        else:
            self.writer.join()
        if self.failed:
            raise self.failed
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.findings, self.entries))
        findings = [f"{finding} (rank {rank})" for rank, (told, _) in enumerate(gathered) for finding in told]
        if findings:
            raise StorageError(findings)
        entries = [entry for _, theirs in gathered for entry in theirs.items()]
        if len(dict(entries)) != len(entries):
            twice = sorted(name for name, count in Counter(name for name, _ in entries).items() if count > 1)
            raise StorageError(f"{self.folder}: written by two ranks: {', '.join(twice)}")
        return dict(entries)

    def _write_all(self) -> None:
        """Everything on disk, and its sizes and hashes known."""
        try:
            if not self.findings:
                with writing(self.folder):
                    self._flush_all()
        except StorageError as error:
            self.findings += error.findings
        except BaseException as error:  # the thread that asks for the result has to tell
            self.failed = error

    def _flush_all(self) -> None:
        found: Entries = {}
        copies = self.copies or {}
        for path in list(copies):
            found[self._name(path)] = _write_copy(path, copies.pop(path))
        for path in self.paths:
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    found[self._name(file)] = _flush(file)
        for parent in sorted({(self.folder / name).parent for name in found}):
            sync_one(parent)
        self.entries = found

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))


def _write_copy(path: Path, copy: io.BytesIO) -> dict[str, Any]:
    with writing(path), path.open("wb", buffering=0) as file, copy.getbuffer() as values:
        write_all(file.fileno(), values, 0)
        os.fsync(file.fileno())
        return {"size": len(values), "sha256": hashlib.sha256(values).hexdigest()}


def _flush(path: Path) -> dict[str, Any]:
    with writing(path), path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
