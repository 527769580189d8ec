"""Writes tensors from where they lie into safetensors files, block by block, on several threads.

Bytes that need no change are copied by the kernel; others are read, converted and written a block at a time. Memory is
that of the blocks, whatever the size of the model.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import IO, Any

import torch

from h3scale.checkpoint.extents import BLOCK_BYTES, Computed, Extent, Stored, bytes_of, read_into
from h3scale.checkpoint.shard_files import ShardFile, TensorSpec
from h3scale.checkpoint.shards import write_all
from h3scale.errors import StorageError
from h3scale.log import Progress

PIECE_BYTES = 64 << 20  # of a tensor that nobody hashes, for one thread
_SPARE_FILES = 64  # open files beside those that are read
_NO_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # of file systems without copy_file_range


@dataclass(frozen=True)
class Piece:
    """A tensor of the hub layout as a piece of an output: in which stored tensor it is, and which expert there.

    `shares`: another stored tensor that is these very bytes, where the source says so itself.
    """

    name: str
    tensor: str
    expert: int | None
    source: Stored | Computed
    shares: str | None = None

    @property
    def extents(self) -> Iterator[Extent]:
        return (extent for stored in inputs_of(self.source).values() for extent in stored.extents)


@dataclass(frozen=True)
class Output:
    """A tensor to write, what its values are made of, and the same piece by piece."""

    spec: TensorSpec
    source: Stored | Computed
    pieces: tuple[Piece, ...]

    @property
    def changes(self) -> bool:
        return isinstance(self.source, Computed) or self.source.dtype != self.spec.dtype

    @property
    def extents(self) -> Iterator[Extent]:
        return (extent for stored in inputs_of(self.source).values() for extent in stored.extents)


def inputs_of(source: Stored | Computed) -> dict[str, Stored]:
    """What is read from disk for a tensor."""
    return source.inputs if isinstance(source, Computed) else {"": source}


# Of each tensor: sha256 as written; where the bytes changed also as read: of the tensor, or by pieces of what it was computed of.
Hashes = dict[str, list[str]]


class Writer:
    """Writes shards with so many threads. `hashing`: the sha256 of every tensor, of unchanged bytes taken once.

    `inputs`: with it also of what tensors are computed of, which is read once more for it.
    """

    def __init__(self, outputs: dict[str, Output], workers: int, hashing: bool, fsync: bool, bar: Progress, inputs: bool = True):
        self.outputs, self.workers, self.hashing, self.fsync, self.bar = outputs, workers, hashing, fsync, bar
        self.inputs = inputs
        self.stopped = False
        self._lock, self._local = threading.Lock(), threading.local()
        self._sources: dict[Path, int] = {}
        _allow_files({extent.path for output in outputs.values() for extent in output.extents})

    def write(self, shard: ShardFile, path: Path) -> Hashes:
        """Writes one shard; it is whole and on disk (`fsync`) when this returns. StorageError (74) when the disk refuses."""
        try:
            with path.open("wb", buffering=0) as file:
                if shard.num_bytes:
                    os.posix_fallocate(file.fileno(), 0, shard.num_bytes)  # a full disk says so now
                write_all(file.fileno(), memoryview(shard.header), 0)
                hashes = self._write_tensors([(spec, shard.offsets[spec.name], file.fileno()) for spec in shard.specs])
                if self.fsync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
        return hashes

    def fill(self, places: Sequence[tuple[Path, TensorSpec, int]]) -> Hashes:
        """Writes tensors into files that have room for them from a byte on, all at once; else as `write`."""
        files: list[IO[bytes]] = []
        with ExitStack() as stack:
            try:
                for path, _, _ in places:
                    files.append(stack.enter_context(path.open("r+b", buffering=0)))
                    os.posix_fallocate(files[-1].fileno(), 0, os.fstat(files[-1].fileno()).st_size)  # its holes too, as above
                hashes = self._write_tensors([(spec, at, file.fileno()) for (_, spec, at), file in zip(places, files, strict=True)])
                for file in files if self.fsync else ():
                    os.fsync(file.fileno())
            except OSError as error:
                raise StorageError(f"{error.filename or places[len(files) - 1][0]}: {error.strerror or error}") from error
        return hashes

    def close(self) -> None:
        """Closes the files that were read."""
        for descriptor in self._sources.values():
            os.close(descriptor)
        self._sources.clear()

    def _write_tensors(self, places: Sequence[tuple[TensorSpec, int, int]]) -> Hashes:
        """Writes each tensor from a byte of an open file on."""
        tasks = [task for spec, at, target in places for task in self._tasks(self.outputs[spec.name], at, target)]
        tasks.sort(key=lambda task: -task.source.numel)  # the largest first: no thread is left alone with it at the end
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = [pool.submit(self._run, task) for task in tasks]
            try:
                hashed = {task.name: future.result() for task, future in zip(tasks, done, strict=True)}
            finally:
                self.stopped = not all(future.done() for future in done)  # Ctrl-C need not wait for a large tensor
                pool.shutdown(cancel_futures=True)
        return {spec.name: hashed[spec.name] for spec, _, _ in places} if self.hashing else {}

    def _tasks(self, output: Output, at: int, target: int) -> Iterator["_Task"]:
        """One task a tensor where it is hashed, from its first byte to its last; else pieces that threads share."""
        spec, source = output.spec, output.source
        if self.hashing or isinstance(source, Computed):
            yield _Task(spec.name, source, spec.dtype, at, target, output.changes)
            return
        step = PIECE_BYTES // source.dtype.itemsize
        for start in range(0, source.numel, step):
            piece = source.flat(start, min(start + step, source.numel))
            yield _Task(spec.name, piece, spec.dtype, at + start * spec.dtype.itemsize, target, output.changes)

    def _run(self, task: "_Task") -> list[str]:
        if not (self.hashing or task.changes):
            self._copy(task)
            return []
        written, read = hashlib.sha256(), hashlib.sha256()
        at = task.at
        for block in self._blocks(task.source, read if self.hashing and task.changes else None):
            values = bytes_of(block.to(task.dtype))
            if self.hashing:
                written.update(values)
            write_all(task.target, values, at)
            at += len(values)
            self._advance(len(values))
        if not task.changes:
            return [written.hexdigest()]
        if isinstance(task.source, Stored):
            return [written.hexdigest(), read.hexdigest()]
        pieces = self.outputs[task.name].pieces if self.hashing and self.inputs else ()
        return [written.hexdigest(), *(stored.sha256() for piece in pieces for stored in inputs_of(piece.source).values())]

    def _copy(self, task: "_Task") -> None:
        assert isinstance(task.source, Stored)
        at = task.at
        for extent in task.source.extents:
            source, done = self._open(extent.path), 0
            while done < extent.num_bytes:
                wanted = min(extent.num_bytes - done, PIECE_BYTES // 4)
                count = self._copy_some(source, task.target, extent.offset + done, at + done, wanted, extent.path)
                done += count
                self._advance(count)
            at += extent.num_bytes

    def _copy_some(self, source: int, target: int, start: int, at: int, wanted: int, path: Path) -> int:
        try:
            count = os.copy_file_range(source, target, wanted, start, at)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            count = 0
        if count == 0:  # not offered between these files, or the source has ended, which reading says
            count = min(wanted, BLOCK_BYTES)
            buffer = self._buffer[:count]
            read_into(source, buffer, start, path)
            write_all(target, buffer, at)
        return count

    def _blocks(self, source: Stored | Computed, read: Any) -> Iterator[torch.Tensor]:
        """The values of a tensor in their order, in a buffer that the next block uses again."""
        if isinstance(source, Computed):
            yield from source.blocks()
            return
        for extent in source.extents:
            descriptor = self._open(extent.path)
            for start in range(0, extent.num_bytes, BLOCK_BYTES):
                buffer = self._buffer[: min(BLOCK_BYTES, extent.num_bytes - start)]
                read_into(descriptor, buffer, extent.offset + start, extent.path)
                if read is not None:
                    read.update(buffer)
                yield torch.frombuffer(buffer, dtype=source.dtype)

    @property
    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = bytearray(BLOCK_BYTES)
        return memoryview(self._local.buffer)

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._sources:
                self._sources[path] = os.open(path, os.O_RDONLY)
            return self._sources[path]

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self.bar.advance(num_bytes / 1e6)
            if self.stopped:
                raise InterruptedError(errno.EINTR, "another thread has failed")


@dataclass(frozen=True)
class _Task:
    """A run of values to write at byte `at` of an open file, `target`."""

    name: str
    source: Stored | Computed
    dtype: torch.dtype
    at: int
    target: int
    changes: bool


def _allow_files(paths: set[Path]) -> None:
    """A checkpoint of a large run has more files than a process may open by default."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = len(paths) + _SPARE_FILES
    if soft < wanted:
        with suppress(ValueError, OSError):
            setrlimit(RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
