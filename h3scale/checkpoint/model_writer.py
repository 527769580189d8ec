"""Writes a model folder from where its tensors lie: planned, checked, streamed, with a receipt; whole, or to be gone on with."""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.journal import Work, check_space, resumed_folder
from h3scale.checkpoint.proof import check_disjoint
from h3scale.checkpoint.receipt import RECEIPT, make_receipt
from h3scale.checkpoint.shard_files import INDEX, ShardFile, TensorSpec, plan_shards
from h3scale.checkpoint.shards import (
    GENERATION,
    TOKENIZER_FILES,
    check_output,
    copy_tokenizer,
    read_json,
    write_descriptions,
    write_json,
)
from h3scale.checkpoint.source_model import SourceModel
from h3scale.checkpoint.stream import Hashes, Output, Piece, Writer
from h3scale.errors import H3Error, OutputError, UnsafeError, UsageError
from h3scale.log import logger, progress
from h3scale.model.families import as_published

MAX_SHARD_BYTES = 5_000_000_000
_OWN_FILES = ("config.json", GENERATION, INDEX, *TOKENIZER_FILES)  # of a model
MAX_WORKERS = 8  # more threads do not make a disk faster


@dataclass(frozen=True)
class Summary:
    """What was written, and from what."""

    target: Path
    source: Path
    kind: str
    step: int | None
    world_size: int
    ep_size: int
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[torch.dtype, ...]
    duration_s: float


@dataclass(frozen=True)
class Options:
    """How a model is written. `dtype`: None for what each tensor has. `only`: a pattern of names, as of a shell.

    `receipt`: None for none.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    only: str | None = None
    workers: int = 0  # threads; 0: as many as there are cores, up to MAX_WORKERS
    receipt: str | Path | None = RECEIPT  # a plain name: in the model's folder
    fsync: bool = True

    @property
    def num_workers(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)

    @property
    def receipt_is_inside(self) -> bool:
        return Path(str(self.receipt)).name == str(self.receipt)

    def check_receipt(self, target: Path, force: bool) -> None:
        """The receipt takes no other file's place: UsageError (2) for one of the model's, OutputError (73) for one elsewhere
        that is there and not of an earlier try (unless `force`), or cannot be there."""
        if self.receipt is None:
            return
        path = Path(str(self.receipt))
        if self.receipt_is_inside:
            if path.name in _OWN_FILES or path.suffix != ".json":
                raise UsageError(f"--receipt: '{path}' is a name for another file of {target} (works: {RECEIPT})")
            return
        if not path.parent.is_dir():
            raise OutputError(f"--receipt: {path}: no such folder (works: a folder that is there)")
        if not (path.is_file() and _receipt_of(path) == target.resolve()):
            check_output(path, force)

    def write_receipt(self, folder: Path, receipt: dict[str, Any]) -> None:
        """Puts the receipt of what is in `folder` where it is wanted."""
        write_json(folder / str(self.receipt) if self.receipt_is_inside else Path(str(self.receipt)), receipt)

    def seen_from_receipt(self, target: Path) -> str:
        """The path of what was written, from the folder of its receipt."""
        return "." if self.receipt_is_inside else os.path.relpath(target, Path(str(self.receipt)).parent)

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """What values of a stored dtype become; integers stay what they are."""
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored


def _receipt_of(path: Path) -> Path | None:
    """The path of the model that a receipt is of; None for any other file."""
    try:
        return (path.parent / read_json(path)["about"]["model"]).resolve()
    except (H3Error, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Plan:
    """What is to be written: the tensors in their order, config.json, and `layout` (or "dense") for the receipt."""

    model: SourceModel
    outputs: dict[str, Output]
    config: dict[str, Any]
    layout: str

    def chosen(self, pattern: str | None) -> dict[str, Output]:
        """The tensors that a pattern of names lets through; UsageError (2) when there is none."""
        found = {name: output for name, output in self.outputs.items() if pattern is None or fnmatchcase(name, pattern)}
        if not found:
            works = f"{next(iter(self.outputs))}, model.layers.0.*"
            raise UsageError(f"--only: '{pattern}' is none of the {len(self.outputs)} tensors (works: {works})")
        return found


def output(name: str, shape: tuple[int, ...], source: Any, pieces: Sequence[Piece], how: Options) -> Output:
    """A tensor to be written of so many pieces."""
    return Output(TensorSpec(name, shape, how.dtype_of(source.dtype)), source, tuple(pieces))


def write_model_folder(plan: Plan, target: str | Path, how: Options, force: bool, what: str) -> Summary:
    """Writes the plan as a Hugging Face folder. The same call goes on where a killed one was."""
    start, model = time.monotonic(), plan.model
    how.check_receipt(Path(target), force)
    outputs = plan.chosen(how.only)
    check_disjoint(outputs)
    keep_source(Path(target), model.path, outputs, model.folder)
    shards = plan_shards([output.spec for output in outputs.values()], how.max_shard_bytes)
    specs = [spec for shard in shards for spec in shard.specs]
    with resumed_folder(target, _key(plan, outputs, shards, how), force, how.fsync) as work:
        check_space(work.folder, sum(shard.num_bytes for shard in shards if shard.name not in work.done))
        hashes = write_shards(work, shards, outputs, what, how.num_workers, how.receipt is not None, how.fsync)
        write_descriptions(work.folder, _final_config(plan.config, specs), shards)
        _copy_extras(model, work.folder, target)
        if how.receipt is not None:
            how.write_receipt(work.folder, make_receipt(work.folder, _about(plan, Path(target), how), shards, outputs, hashes))
    return Summary(
        target=Path(target),
        source=model.path,
        kind=model.weights.kind,
        step=model.step,
        world_size=model.weights.world_size,
        ep_size=model.weights.ep_size,
        num_tensors=len(specs),
        num_parameters=sum(spec.num_bytes // spec.dtype.itemsize for spec in specs),
        num_bytes=sum(spec.num_bytes for spec in specs),
        dtypes=_floating(specs),
        duration_s=time.monotonic() - start,
    )


def _copy_extras(model: SourceModel, target: Path, shown: str | Path) -> None:
    """The tokenizer and the generation config, where there are any."""
    tokenizer = model.tokenizer or model.folder
    if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
        logger.warning("%s: has no tokenizer, so %s has none", tokenizer, shown)
    copy_tokenizer(tokenizer, target)
    if (model.folder / GENERATION).is_file():
        shutil.copyfile(model.folder / GENERATION, target / GENERATION)


def keep_source(target: Path, source: Path, outputs: dict[str, Output], *more: Path) -> None:
    """UnsafeError (77) when the target is, or holds, what is read: the files of the outputs, and `more`."""
    read = {extent.path for output in outputs.values() for extent in output.extents} | set(more)
    final = target.resolve()
    if any(final == path.resolve() or final in path.resolve().parents for path in read):
        raise UnsafeError(f"{target}: would replace what it is made from, {source} (choose another name)")


def write_shards(
    work: Work,
    shards: Sequence[ShardFile],
    outputs: dict[str, Output],
    what: str,
    workers: int,
    hashing: bool,
    fsync: bool,
    inputs: bool = True,
) -> Hashes:
    """Writes the shards that are not there yet; hashes as Writer has them. `what`: the word beside the bar."""
    hashes: Hashes = {}
    before = sum(shard.num_bytes for shard in shards if shard.name in work.done)
    with progress(what, sum(shard.num_bytes for shard in shards) / 1e6, "MB", before / 1e6) as bar:
        writer = Writer(outputs, workers, hashing=hashing, fsync=fsync, bar=bar, inputs=inputs)
        try:
            for shard in shards:
                if shard.name not in work.done:
                    work.finish(shard.name, writer.write(shard, work.unfinished()))
                hashes |= work.done[shard.name]
        finally:
            writer.close()
    return hashes


def _key(plan: Plan, outputs: dict[str, Output], shards: list[ShardFile], how: Options) -> str:
    """Of the same work, the same: what is read, as it is now, and what is to come of it."""
    files = {extent.path for output in outputs.values() for extent in output.extents}
    folders = {plan.model.folder, plan.model.tokenizer or plan.model.folder}
    files |= {path for folder in folders for path in folder.iterdir() if path.is_file()}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    work = [(piece.tensor, piece.expert, list(piece.extents)) for output in outputs.values() for piece in output.pieces]
    headers = [shard.header for shard in shards]
    return hashlib.sha256(repr([stats, work, headers, plan.config, plan.layout, str(how.receipt)]).encode()).hexdigest()


def _about(plan: Plan, target: Path, how: Options) -> dict[str, Any]:
    model = plan.model
    return {
        "source": str(model.path),
        "model": how.seen_from_receipt(target),
        "kind": model.weights.kind,
        "step": model.step,
        "world_size": model.weights.world_size,
        "ep_size": model.weights.ep_size,
        "layout_read": model.layout,
        "layout": plan.layout,
        "dtype": None if how.dtype is None else str(how.dtype).removeprefix("torch."),
        "only": how.only,
        "model_type": model.config.get("model_type"),
    }


def _final_config(config: dict[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    final = as_published({key: value for key, value in config.items() if key != "torch_dtype"})
    dtypes = _floating(specs)
    return final | ({"dtype": str(dtypes[-1]).removeprefix("torch.")} if dtypes else {})


def _floating(specs: Sequence[TensorSpec]) -> tuple[torch.dtype, ...]:
    """The number formats of weights, the widest last."""
    found = {spec.dtype for spec in specs if spec.dtype.is_floating_point}
    return tuple(sorted(found, key=lambda dtype: (dtype.itemsize, str(dtype))))
