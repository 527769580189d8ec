"""A rank's files of a checkpoint that is being made: flushed and hashed by whoever wrote them, and known to all ranks then.

On shared file systems (NFS) a rank need not see what another one has just written, nor can it flush it.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from h3scale.checkpoint.shards import sync_one
from h3scale.errors import StorageError
from h3scale.train.storage import writing


class OwnFiles:
    """What this rank writes into a checkpoint's `folder`.

    A write that fails is remembered, and told when all ranks agree: until then every rank goes on as the others do, which
    would else wait for it in a collective.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: list[Path] = []
        self.findings: list[str] = []

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
        saver.save = lambda state_dict, path: self.write(Path(path), lambda target: plain(state_dict, str(target)))
        engine._copy_recovery_script = lambda _folder: None
        try:
            yield
        finally:
            del saver.save, engine._copy_recovery_script  # the classes' own come to light again

    def agreed(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every rank's files, by their names; they are on disk then. Every rank calls this.

        StorageError (74) on all ranks where one could not write, with what each one says.
        """
        mine: dict[str, dict[str, Any]] = {}
        if not self.findings:
            try:
                with writing(self.folder):
                    mine = self._flushed()
            except StorageError as error:
                self.findings += error.findings
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.findings, mine))
        findings = [f"{finding} (rank {rank})" for rank, (told, _) in enumerate(gathered) for finding in told]
        if findings:
            raise StorageError(findings)
        entries = [entry for _, theirs in gathered for entry in theirs.items()]
        if len(dict(entries)) != len(entries):
            twice = sorted(name for name, count in Counter(name for name, _ in entries).items() if count > 1)
            raise StorageError(f"{self.folder}: written by two ranks: {', '.join(twice)}")
        return dict(entries)

    def _flushed(self) -> dict[str, dict[str, Any]]:
        files = [file for path in self.paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
        found = {str(file.relative_to(self.folder)): _flush(file) for file in files}
        for parent in sorted({file.parent for file in files}):
            sync_one(parent)
        return found


def _flush(path: Path) -> dict[str, Any]:
    with writing(path), path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
