"""Hugging Face model folders on disk: read one tensor at a time, written whole or not at all.

Nothing here needs a model in memory. Hash-checked commits of training checkpoints are another file's matter.
"""

import ctypes
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from h3scale.checkpoint.extents import Stored, bytes_of
from h3scale.checkpoint.inside import file_inside
from h3scale.checkpoint.shard_files import (
    DTYPES,
    INDEX,
    WEIGHTS,
    ShardFile,
    TensorSpec,
    entries_of,
    index_of,
    plan_shards,
    unique_keys,
)
from h3scale.errors import DataError, MissingInputError, OutputError
from h3scale.log import progress
from h3scale.redact import without_secrets

GENERATION = "generation_config.json"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


_MAX_JSON_BYTES = 1 << 28  # an index of a million tensors has half of it


class ModelFolder:
    """A folder with config.json and safetensors weights. Tensors are read when they are asked for.

    Raises MissingInputError (66) when the folder, its config or a shard is missing, DataError (65) when a file is
    broken, UnsafeError (77) when the index points outside the folder. `config_from`: another folder that has the config.
    """

    def __init__(self, path: str | Path, config_from: str | Path | None = None):
        self.path, self.config_from = Path(path), Path(config_from or path)
        for folder in (self.path, self.config_from):
            if not folder.is_dir():
                raise MissingInputError(f"{folder}: no such model folder")
        if not (self.config_from / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in self.config_from.iterdir())[:6]) or "nothing"
            raise MissingInputError(f"{self.config_from}: no config.json, so this is no model folder (found: {found})")

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.config_from / "config.json")

    @cached_property
    def files(self) -> dict[str, str]:
        """The file (a plain name inside the folder) of each tensor."""
        if (self.path / INDEX).is_file():
            weight_map: dict[str, str] = read_json(self.path / INDEX).get("weight_map", {})
            for name, file in weight_map.items():
                file_inside(self.path, file, f"{self.path / INDEX}: tensor '{name}' is said to be in")
            missing = sorted({f for f in weight_map.values() if not (self.path / f).is_file()})
            if missing:
                raise MissingInputError([f"{self.path / file}: named in {INDEX}, but missing" for file in missing])
            return weight_map
        if not (self.path / WEIGHTS).is_file():
            raise MissingInputError(f"{self.path}: neither {WEIGHTS} nor {INDEX} (only safetensors are read)")
        with self._open(WEIGHTS, "np") as handle:
            return dict.fromkeys(handle.keys(), WEIGHTS)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, from the headers alone."""
        specs = {}
        for file in sorted(set(self.files.values())):
            with self._open(file, "np") as handle:
                for name in handle.keys():  # noqa: SIM118 (no mapping)
                    piece = handle.get_slice(name)
                    specs[name] = TensorSpec(name, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        self._check_present(specs)
        return specs

    @cached_property
    def entries(self) -> dict[str, Stored]:
        """Where the bytes of every tensor lie. DataError (65) when a tensor is not in the file that the index names."""
        entries: dict[str, Stored] = {}
        for file in sorted(set(self.files.values())):
            path = self.path / file
            for name, (spec, offset) in entries_of(path).items():
                if self.files.get(name) != file:
                    raise DataError(f"{path}: has '{name}', which {INDEX} has in {self.files.get(name, 'no file')}")
                entries[name] = Stored.at(path, spec, offset)
        self._check_present(entries)
        return entries

    def _check_present(self, found: Collection[str]) -> None:
        absent = sorted(set(self.files) - set(found))
        if absent:
            raise DataError([f"{self.path}: '{name}' is in the index but in no shard" for name in absent])

    def tensor(self, name: str) -> torch.Tensor:
        """The values of one tensor, on the CPU, in the file's dtype."""
        if name not in self.files:
            raise DataError(f"{self.path}: has no tensor '{name}'")
        with self._open(self.files[name]) as handle:
            return handle.get_tensor(name)

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The values `start` to `stop` of one tensor laid flat, in the file's dtype; only the rows they lie in are read."""
        shape = self.specs[name].shape
        row = prod(shape[1:])
        first = start // max(row, 1)
        with self._open(self.files[name]) as handle:
            rows = handle.get_slice(name)[first : -(-stop // max(row, 1))]
        return rows.flatten()[start - first * row : stop - first * row]

    @contextmanager
    def _open(self, file: str, framework: str = "pt") -> Iterator[Any]:
        """`framework`: for headers "np", since for torch it asks for as much memory as the file has bytes."""
        try:
            handle = safe_open(self.path / file, framework=framework)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.path / file}: not a readable safetensors file ({error})") from error
        with handle as opened:
            yield opened


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; MissingInputError (66) or DataError (65) with the path.

    One with two values for a key is refused: readers differ in which they take.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes of JSON (works: {_MAX_JSON_BYTES} at most)")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block ended well; built beside it and renamed.

    Raises OutputError (73) at once when `path` exists and is not to be replaced (`force`), or cannot be made.
    """
    final = Path(path)
    check_output(final, force)
    partial = final.with_name(f".partial-{final.name}-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{final}: cannot be made ({error.strerror})") from error
    try:
        yield partial
        sync(partial)
        put(partial, final)
        sync_one(final.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put(new: Path, old: Path) -> None:
    """`new` gets the name `old`; what had it is deleted. Where names can be swapped, no moment is without either."""
    if not _occupied(old):
        new.rename(old)
        return
    aside = old.with_name(f".trash-{old.name}-{uuid.uuid4().hex[:8]}")
    try:
        exchange(new, old)
        new.rename(aside)
    except OSError as error:
        if error.errno not in CANNOT_EXCHANGE:
            raise
        old.rename(aside)
        new.rename(old)
    shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def exchange(one: Path, other: Path) -> None:
    """Swaps two names in one moment. OSError (CANNOT_EXCHANGE) where the kernel or the file system has no such thing (NFS)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def check_output(path: str | Path, force: bool = False) -> None:
    """Raises OutputError (73) when an output is there already; an empty folder counts as not there."""
    path = Path(path)
    if _occupied(path) and not force:
        raise OutputError(f"{path}: exists already (choose another name, or --force to replace it)")


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def write_model(
    folder: Path,
    config: dict[str, Any],
    specs: Sequence[TensorSpec],
    produce: Callable[[str], torch.Tensor],
    what: str = "write",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors shards (with an index when more than one) into an existing folder.

    `produce(name)` gives each tensor when its turn comes; one tensor is in memory at a time. Its shape and dtype must be
    those of the spec (else DataError: a conversion that changes a shape in silence is the field's commonest bug).
    """
    shards = plan_shards(specs, max_shard_bytes)
    with progress(what, sum(s.num_bytes for s in specs) / 1e6, "MB") as bar:
        for shard in shards:
            with (folder / shard.name).open("wb", buffering=0) as file:
                write_all(file.fileno(), memoryview(shard.header), 0)
                # in the order asked for: what comes out of one source may stand together
                for spec in (spec for spec in specs if spec.name in shard.offsets):
                    tensor = produce(spec.name)
                    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                        raise DataError(f"{spec.name}: planned {spec.shape} {spec.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
                    write_all(file.fileno(), bytes_of(tensor), shard.offsets[spec.name])
                    bar.advance(spec.num_bytes / 1e6)
    write_descriptions(folder, config, shards)


def write_descriptions(folder: Path, config: dict[str, Any], shards: Sequence[ShardFile]) -> None:
    """Writes config.json, and the index of several shards."""
    index = index_of(shards)
    if index is not None:
        write_json(folder / INDEX, index, hide=False)
    write_json(folder / "config.json", config, hide=False)


def write_all(descriptor: int, values: memoryview, offset: int) -> None:
    """Writes bytes at a place in a file, however many calls it takes."""
    done = 0
    while done < len(values):
        done += os.pwrite(descriptor, values[done:], offset + done)


def write_json(path: Path, value: Any, hide: bool = True) -> None:
    """JSON with a final newline, in the order given, passwords hidden; by atomic rename, and not torn by a power cut.

    `hide`: not for a model's own files, where every string counts (a variable BOS_TOKEN is no secret).
    """
    text = json.dumps(without_secrets(value) if hide else value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """A file by atomic rename, not torn by a power cut."""
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files; nothing when the source has none."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def sync(folder: Path) -> None:
    """fsync of every file and of the folder, so that the rename cannot come before the bytes."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """fsync of a file, or of the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
