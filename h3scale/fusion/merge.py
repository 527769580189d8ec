"""Dense models of one base become one model of the same form: checked, streamed, written with its provenance."""

import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from h3scale import __version__
from h3scale.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from h3scale.checkpoint.journal import check_space, resumed_folder
from h3scale.checkpoint.model_writer import MAX_SHARD_BYTES, MAX_WORKERS, write_shards
from h3scale.checkpoint.receipt import RECEIPT, make_receipt, sha256
from h3scale.checkpoint.release import MERGE
from h3scale.checkpoint.shard_files import ShardFile, TensorSpec, plan_shards
from h3scale.checkpoint.shards import check_output, write_descriptions, write_json
from h3scale.checkpoint.stream import Output, Piece
from h3scale.config.merge import MergeRecipe, Options
from h3scale.config.recipe import DenseFamily
from h3scale.errors import DataError
from h3scale.fusion.compatible import base_warnings, check_fit, expected_shapes, full_config, tokenizer_folder
from h3scale.fusion.conversation import copy_conversation
from h3scale.fusion.device import check_device
from h3scale.fusion.merged import Merger
from h3scale.fusion.parents import Parents
from h3scale.fusion.sources import DenseSource, Source, keep_inputs, open_sources
from h3scale.log import progress
from h3scale.merge.registry import METHODS
from h3scale.model.names import EMBEDDINGS

_UNTOLD = ("torch_dtype", "auto_map", "_name_or_path")  # of the base's config.json


@dataclass(frozen=True)
class How:
    """How a merge is carried out; none of it changes a value but `device`, within rounding. `workers` 0: one a core."""

    device: str = "cpu"
    workers: int = 0
    max_shard_bytes: int = MAX_SHARD_BYTES
    hashes: bool = True  # sha256 of every file that is read, for merge.json
    fsync: bool = True
    receipt: bool = True  # with the sha256 of every tensor; without it is for measuring

    @property
    def num_workers(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@dataclass(frozen=True)
class MergePlan:
    """What will be written. `tensors`: all in their order, the tied ones left out."""

    recipe: MergeRecipe
    options: Options
    parents: Parents
    tensors: tuple[TensorSpec, ...]
    config: dict[str, Any]
    tokenizer: Path | None
    warnings: tuple[str, ...]

    def text(self) -> str:
        """What a person reads before it happens."""
        method = METHODS[self.recipe.method]
        weights = self.options.weights_of(len(self.parents.models))
        lines = [f"base: {self.parents.base.kind} {self.parents.base.path}"]
        lines += [f"{m.label}: {m.kind} {m.path}, weight {w:g}" for m, w in zip(self.parents.models.values(), weights, strict=True)]
        lines.append(f"tokenizer: {self.tokenizer or 'none'}")
        told = ", ".join(f"{key} {value}" for key, value in self.options.model_dump(exclude={"weights"}).items())
        lines.append(f"{method.title}{f' (arXiv {method.paper})' if method.paper else ''}: {told}")
        count = sum(spec.num_bytes // spec.dtype.itemsize for spec in self.tensors)
        lines.append(f"{len(self.tensors)} tensors, {count:,} parameters, {self.config['dtype']}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class MergeSummary:
    """What `merge` did."""

    out: Path
    plan: MergePlan
    num_bytes: int
    duration_s: float


def plan_merge(recipe: MergeRecipe, options: Options, device: str = "cpu") -> MergePlan:
    """Checks that the parents fit together; only headers and configs are read.

    DataError (65) with all findings: family, config, tensors that are missing, unknown, of another shape or format, tokenizer.
    """
    base, models = open_sources(recipe.base_folder, recipe.models)
    shapes = _checked(base, models, recipe)
    asked = getattr(torch, recipe.dtype) if recipe.dtype else None
    tensors = tuple(TensorSpec(name, shape, asked or base.specs[name].dtype) for name, shape in shapes.items())
    tokenizer = tokenizer_folder([base.path, *(source.path for source in models.values())])
    warnings = base_warnings(models)
    if tokenizer is None:
        warnings.append(f"{base.path} and the models have no tokenizer, so {recipe.out} has none")
    config = {key: value for key, value in base.folder.config.items() if key not in _UNTOLD}
    config["dtype"] = str(max((spec.dtype for spec in tensors), key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    parents = Parents(base, models, torch.device(device))
    return MergePlan(recipe, options, parents, tensors, config, tokenizer, tuple(warnings))


def merge(
    recipe: MergeRecipe,
    options: Options,
    force: bool = False,
    how: How | None = None,
    show: Any = None,
    searched: Mapping[str, Any] | None = None,
) -> MergeSummary:
    """Writes the merged model to `recipe.out`, whole or not at all; the same call goes on where a killed one was.

    `show` gets the plan before anything is written; `searched`: how the options were chosen, for merge.json. Raises OutputError
    (73) when `out` exists, UnsafeError (77) when replacing it would take a parent away, UsageError (2) for a device that is not
    there, what plan_merge raises, and DataError (65) for values that are not finite.
    """
    start, how, out = time.monotonic(), how or How(), Path(recipe.out)
    check_output(out, force)
    keep_inputs({"base": recipe.base_folder, **{f"models.{label}": path for label, path in recipe.models.items()}}, out)
    check_device(how.device)
    plan = plan_merge(recipe, options, how.device)
    if show is not None:
        show(plan)
    outputs = outputs_of(plan)
    shards = plan_shards(plan.tensors, how.max_shard_bytes)
    with resumed_folder(out, _key(plan, shards, how), force, how.fsync) as work:
        check_space(work.folder, sum(shard.num_bytes for shard in shards if shard.name not in work.done))
        # merge.json has the sha256 of what was read, file by file
        hashes = write_shards(work, shards, outputs, "merge", how.num_workers, how.receipt, how.fsync, inputs=False)
        write_descriptions(work.folder, plan.config, shards)
        copy_conversation(plan.tokenizer, plan.parents.base.path, work.folder)
        write_json(work.folder / MERGE, provenance(plan, how) | {"search": searched})
        if how.receipt:
            write_json(work.folder / RECEIPT, make_receipt(work.folder, _about(plan), shards, outputs, hashes))
    return MergeSummary(out, plan, sum(shard.num_bytes for shard in shards), time.monotonic() - start)


def outputs_of(plan: MergePlan) -> dict[str, Output]:
    """What every tensor is made of."""
    names = tuple(spec.name for spec in plan.tensors)
    merger = Merger(plan.parents, plan.recipe.method, plan.options, names, EMBEDDINGS)
    merger.prepare()
    sources = {spec: merger.source(spec.name, spec.dtype) for spec in plan.tensors}
    return {spec.name: Output(spec, made, (Piece(spec.name, spec.name, None, made),)) for spec, made in sources.items()}


def provenance(plan: MergePlan, how: How) -> dict[str, Any]:
    """Where the model comes from: method, options, parents with the sha256 of their files. No dates."""
    method, weights = METHODS[plan.recipe.method], plan.options.weights_of(len(plan.parents.models))
    hashes = _hashed(plan.parents, how)
    models = plan.parents.models.values()
    return {
        "method": plan.recipe.method,
        "title": method.title,
        "paper": method.paper,
        "options": plan.options.model_dump(exclude={"weights"}),
        "base": {"path": str(plan.parents.base.path), "files": hashes["base"]},
        "models": {
            source.label: {"path": str(source.path), "kind": source.kind, "weight": weight, "files": hashes[source.label]}
            for source, weight in zip(models, weights, strict=True)
        },
        "dtype": plan.config["dtype"],
        "device": how.device,
        "h3scale": __version__,
    }


def _checked(base: DenseSource, models: Mapping[str, Source], recipe: MergeRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is merged."""
    family = base.folder.config.get("model_type")
    if family not in get_args(DenseFamily):
        raise DataError(f"{base.path}: model_type '{family}' cannot be merged (works: {', '.join(get_args(DenseFamily))})")
    dense = full_config(base.folder)
    shapes, tied = expected_shapes(dense)
    check_fit(base, models, dense, shapes, tied, same_dtype=recipe.dtype is None)
    return {name: shape for name, shape in shapes.items() if name not in tied}


def _files(source: Source) -> list[Path]:
    """What a parent's weights and meaning are read from."""
    if isinstance(source, DenseSource):
        return [source.path / name for name in ["config.json", *sorted(set(source.folder.files.values()))]]
    return [source.path / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]


def _hashed(parents: Parents, how: How) -> dict[str, dict[str, str] | None]:
    """Of the base and each model the sha256 of their files; a folder that is both is read once."""
    sources = {"base": parents.base, **parents.models}
    if not how.hashes:
        return dict.fromkeys(sources)
    paths = sorted({path for source in sources.values() for path in _files(source)})
    with ThreadPoolExecutor(how.num_workers) as pool, progress("sha256 of the parents", len(paths), "files") as bar:
        found = {}
        for path, digest in zip(paths, pool.map(sha256, paths), strict=True):
            found[path] = digest
            bar.advance()
    return {label: {path.name: found[path] for path in _files(source)} for label, source in sources.items()}


def _about(plan: MergePlan) -> dict[str, Any]:
    return {
        "source": str(plan.parents.base.path),
        "model": ".",
        "kind": f"merge by {plan.recipe.method}, see {MERGE}",
        "step": None,
        "dtype": plan.config["dtype"],
        "only": None,
        "model_type": plan.config.get("model_type"),
    }


def state_of(plan: MergePlan) -> list[tuple[str, int, int]]:
    """The files of the parents as they are now: path, bytes, time of the last change (ns)."""
    files = sorted({path for source in (plan.parents.base, *plan.parents.models.values()) for path in _files(source)})
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _key(plan: MergePlan, shards: list[ShardFile], how: How) -> str:
    """Of the same work, the same: the parents as they are now, what is done to them, and what is to come of it."""
    work = [plan.recipe.model_dump(exclude={"out"}), plan.options.model_dump(), how.device, how.hashes, how.receipt, __version__]
    return hashlib.sha256(repr([state_of(plan), work, [shard.header for shard in shards]]).encode()).hexdigest()
