"""From a training checkpoint to a Hugging Face folder in hub layout: every tensor exactly once, or nothing at all.

A training checkpoint is `checkpoints/NAME/step-000120/` with `deepspeed/` (DeepSpeed's tag folder), `model/` (config,
tokenizer), `probe.safetensors` (an input and the engine's logits on it) and `manifest.json` (sizes and sha256).
"""

import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.extents import Weights
from h3scale.checkpoint.journal import Work, check_space, resumed_folder
from h3scale.checkpoint.lora import open_weights
from h3scale.checkpoint.receipt import RECEIPT, check_disjoint, make_receipt, sha256
from h3scale.checkpoint.shard_files import ShardFile, TensorSpec, plan_shards
from h3scale.checkpoint.shards import check_output, copy_tokenizer, read_json, write_descriptions, write_json
from h3scale.checkpoint.stream import Hashes, Output, Writer
from h3scale.checkpoint.tag_folder import UNIVERSAL
from h3scale.errors import DataError, MissingInputError, UnsafeError, UsageError
from h3scale.log import progress
from h3scale.model import names
from h3scale.model.families import as_published, expert_size, num_experts

MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
SUMS = "SHA256SUMS"
GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
MAX_WORKERS = 8  # more threads do not make a disk faster
_LISTED = 20  # findings of one kind that are written out; the rest is counted


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One step of a run, found on disk. A bare DeepSpeed tag folder has no manifest and no probe."""

    path: Path
    deepspeed: Path
    model: Path
    manifest: dict[str, Any] | None

    @property
    def probe(self) -> Path | None:
        path = self.path / PROBE
        return path if self.manifest is not None and path.is_file() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.model / "config.json")

    def check_sizes(self) -> None:
        """DataError (65) naming every file of the manifest that is missing or has another size."""
        findings = []
        for name, entry in self._listed():
            path = self.path / name
            if not path.is_file():
                findings.append(f"{path}: in {MANIFEST}, but missing")
            elif path.stat().st_size != entry["size"]:
                findings.append(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}")
        if findings:
            raise DataError(findings)

    def check_hashes(self, part: int = 0, parts: int = 1) -> list[str]:
        """A finding for each file of the manifest whose sha256 is another one; reads everything (about 1 GB/s).

        Every `parts`-th file from `part` on, for several processes that share the work.
        """
        self.check_sizes()
        return [
            f"{self.path / name}: sha256 differs from {MANIFEST}: the file has changed since it was saved"
            for name, entry in self._listed()[part::parts]
            if sha256(self.path / name) != entry["sha256"]
        ]

    def _listed(self) -> list[tuple[str, dict[str, Any]]]:
        files = (self.manifest or {}).get("files", {})
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UnsafeError(f"{self.path / MANIFEST}: names '{name}', outside the checkpoint")
        return sorted(files.items())


@dataclass(frozen=True)
class Summary:
    """What a consolidation wrote."""

    target: Path
    source: Path
    kind: str
    step: int | None
    world_size: int
    ep_size: int
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtype: torch.dtype
    duration_s: float


def find_checkpoint(source: str | Path, config_from: str | Path | None = None) -> TrainingCheckpoint:
    """The checkpoint that `source` names: a step folder, a run folder, or a DeepSpeed tag folder.

    Of a run's steps it is the one that its manifest calls the best (evaluation.keep_best), else the newest.

    A tag folder needs `config_from`, a folder with config.json. Raises MissingInputError (66) with what would work.
    """
    path = Path(source)
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such checkpoint folder")
    if not (path / MANIFEST).is_file():
        steps = [p for p in path.iterdir() if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).is_file()]
        if steps:
            best = [p for p in steps if read_json(p / MANIFEST).get("best")]
            path = max(best or steps, key=lambda p: int(p.name.removeprefix("step-")))
    if (path / MANIFEST).is_file():
        model = Path(config_from) if config_from else path / "model"
        return TrainingCheckpoint(path, path / "deepspeed", model, read_json(path / MANIFEST))
    if any(path.glob("*_states.pt")) or (path / UNIVERSAL).is_dir():
        if config_from is None:
            raise MissingInputError(f"{path}: a bare DeepSpeed folder has no config.json (works: --config-from MODEL_FOLDER)")
        return TrainingCheckpoint(path, path, Path(config_from), None)
    raise MissingInputError(
        f"{path}: no checkpoint (works: a folder with {MANIFEST}, a run folder with step-* in it, a tag folder)"
    )


@dataclass(frozen=True)
class Options:
    """How a model is written. `only`: a pattern of names, as of a shell. `receipt`: None for none."""

    dtype: torch.dtype = torch.float32
    max_shard_bytes: int = MAX_SHARD_BYTES
    only: str | None = None
    workers: int = 0  # threads; 0: as many as there are cores, up to MAX_WORKERS
    receipt: str | Path | None = RECEIPT  # a plain name: in the model's folder
    fsync: bool = True

    @property
    def num_workers(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def consolidate(
    source: str | Path,
    target: str | Path,
    *,
    config_from: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Summary:
    """Writes a training checkpoint as a Hugging Face folder (config, safetensors, tokenizer) with a receipt; see Options.

    Values come from the optimizer's fp32 partitions (frozen tensors: as trained with) and are rounded to `dtype`, block by
    block. Names, shapes and numbers of tensors must be those that config.json asks for, else DataError (65) lists what is
    missing, unknown or of another shape, and nothing is written. The same call goes on where a killed one was.
    """
    start, how = time.monotonic(), Options(**options)
    check_output(target, force)
    checkpoint = find_checkpoint(source, config_from)
    checkpoint.check_sizes()
    weights = open_weights(checkpoint.deepspeed, checkpoint.model)
    outputs = _outputs(checkpoint, weights, how)
    check_disjoint(outputs)
    shards = plan_shards([output.spec for output in outputs.values()], how.max_shard_bytes)
    with resumed_folder(target, _key(checkpoint, outputs, shards, how), force, how.fsync) as work:
        check_space(work.folder, sum(shard.num_bytes for shard in shards if shard.name not in work.done))
        hashes = _write_shards(work, shards, outputs, how)
        write_descriptions(work.folder, _final_config(checkpoint.config, how.dtype), shards)
        copy_tokenizer(checkpoint.model, work.folder)
        if (checkpoint.model / GENERATION).is_file():
            shutil.copyfile(checkpoint.model / GENERATION, work.folder / GENERATION)
        if how.receipt is not None:
            inside = work.folder / how.receipt if Path(how.receipt).name == str(how.receipt) else None
            receipt = make_receipt(work.folder, _about(checkpoint, weights, Path(target), how), shards, outputs, hashes)
            write_json(inside or Path(how.receipt), receipt)
    specs = [output.spec for output in outputs.values()]
    return Summary(
        target=Path(target),
        source=checkpoint.path,
        kind=weights.kind,
        step=(checkpoint.manifest or {}).get("step"),
        world_size=weights.world_size,
        ep_size=weights.ep_size,
        num_tensors=len(specs),
        num_parameters=sum(spec.num_bytes // spec.dtype.itemsize for spec in specs),
        num_bytes=sum(spec.num_bytes for spec in specs),
        dtype=how.dtype,
        duration_s=time.monotonic() - start,
    )


def _outputs(checkpoint: TrainingCheckpoint, weights: Weights, how: Options) -> dict[str, Output]:
    """What is to be written, by name, in the order of the config."""
    outputs = {}
    for name, (shape, (stored, expert)) in _match(checkpoint, weights).items():
        source = weights.source(stored, expert)
        dtype = how.dtype if source.dtype.is_floating_point else source.dtype
        outputs[name] = Output(TensorSpec(name, shape, dtype), source, weights.stored_name(stored), expert)
    chosen = {name: output for name, output in outputs.items() if how.only is None or fnmatchcase(name, how.only)}
    if not chosen:
        raise UsageError(
            f"--only: '{how.only}' is none of the {len(outputs)} tensors (works: {next(iter(outputs))}, model.layers.0.*)"
        )
    return chosen


def _write_shards(work: Work, shards: list[ShardFile], outputs: dict[str, Output], how: Options) -> Hashes:
    hashes: Hashes = {}
    before = sum(shard.num_bytes for shard in shards if shard.name in work.done)
    with progress("consolidate", sum(shard.num_bytes for shard in shards) / 1e6, "MB", before / 1e6) as bar:
        writer = Writer(outputs, how.num_workers, hashing=how.receipt is not None, fsync=how.fsync, bar=bar)
        try:
            for shard in shards:
                if shard.name not in work.done:
                    work.finish(shard.name, writer.write(shard, work.unfinished()))
                hashes |= work.done[shard.name]
        finally:
            writer.close()
    return hashes


def _key(checkpoint: TrainingCheckpoint, outputs: dict[str, Output], shards: list[ShardFile], how: Options) -> str:
    """Of the same work, the same: what is read, as it is now, and what is to come of it."""
    files = {extent.path for output in outputs.values() for extent in output.extents}
    files |= {path for path in checkpoint.model.iterdir() if path.is_file()}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    plan = [(output.name, output.expert, list(output.extents)) for output in outputs.values()]
    return hashlib.sha256(repr([stats, plan, [shard.header for shard in shards], str(how.receipt)]).encode()).hexdigest()


def _about(checkpoint: TrainingCheckpoint, weights: Weights, target: Path, how: Options) -> dict[str, Any]:
    receipt = Path(how.receipt or RECEIPT)
    inside = receipt.name == str(receipt)
    return {
        "source": str(checkpoint.path),
        "model": "." if inside else os.path.relpath(target, receipt.parent),
        "kind": weights.kind,
        "step": (checkpoint.manifest or {}).get("step"),
        "world_size": weights.world_size,
        "ep_size": weights.ep_size,
        "dtype": str(how.dtype).removeprefix("torch."),
        "only": how.only,
        "model_type": checkpoint.config.get("model_type"),
    }


def expected_shapes(config: dict[str, Any], where: str | Path) -> dict[str, tuple[int, ...]]:
    """Names (hub layout) and shapes of all tensors that a model of this config.json has on disk; tied ones once.

    transformers builds the model without values; a mixture of experts is spelled by model/names.py.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{where}: transformers cannot build a model from this config.json ({error})") from error
    tied = set(model.all_tied_weights_keys) if settings.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    moe = names.MOE.get(settings.model_type)
    if moe is None:
        return shapes
    experts = _expert_shapes(moe, settings)
    return {name: shape for name, shape in shapes.items() if ".mlp." not in name} | experts


def stored_as(name: str, moe_type: str | None) -> tuple[str, int | None]:
    """Where a hub tensor is in a training checkpoint: the stored name, and which of its stacked experts."""
    moe = names.MOE.get(moe_type or "")
    if moe is None:
        return name, None
    router = names.match(moe.hub_router, name)
    if router is not None:
        return moe.autoep_router.format(**router), None
    for projection, template in moe.hub_experts.items():
        found = names.match(template, name)
        if found is not None:
            return moe.autoep_experts[projection].format(layer=found["layer"]), found["expert"]
    return name, None


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS of all files of a folder, in the form `sha256sum -c` reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str | Path) -> list[str]:
    """A finding for each tensor that is missing, unknown or of another shape."""
    shared = found.keys() & expected.keys()
    other = [name for name in expected if name in shared and found[name] != expected[name]]
    return [
        *_listing([name for name in expected if name not in shared], lambda name: f"{where}: {name} {expected[name]} is missing"),
        *_listing(
            [name for name in found if name not in shared], lambda name: f"{where}: {name} {found[name]} is in no such model"
        ),
        *_listing(other, lambda name: f"{where}: {name} is {found[name]}, config.json asks for {expected[name]}"),
    ]


def _listing(items: list[str], say: Any) -> list[str]:
    rest = len(items) - _LISTED
    return [say(item) for item in items[:_LISTED]] + ([f"... and {rest} more like this"] if rest > 0 else [])


def _match(checkpoint: TrainingCheckpoint, weights: Weights) -> dict[str, tuple[tuple[int, ...], tuple[str, int | None]]]:
    """For each tensor to write: its shape, and where its values are. DataError when the two sides are not the same set."""
    moe_type = checkpoint.config.get("model_type")
    expected = expected_shapes(checkpoint.config, checkpoint.model)
    origins = {name: (shape, stored_as(name, moe_type)) for name, shape in expected.items()}
    experts: dict[str, int] = {}
    for stored, expert in (origin for _, origin in origins.values()):
        if expert is not None:
            experts[stored] = max(experts.get(stored, 0), expert + 1)
    wanted = {stored: shape if expert is None else (experts[stored], *shape) for shape, (stored, expert) in origins.values()}
    found = {name: spec.shape for name, spec in weights.specs.items()}
    found |= {alias: found[name] for alias, name in weights.aliases.items() if alias in wanted and name in found}
    findings = differences(found, wanted, checkpoint.deepspeed)
    if findings:
        raise DataError(findings)
    return origins


def _expert_shapes(moe: names.MoeNames, settings: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner, count = settings.hidden_size, expert_size(settings), num_experts(settings) or 0
    of = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(settings.num_hidden_layers):
        shapes[moe.hub_router.format(layer=layer)] = (count, hidden)
        for expert in range(count):
            for projection in names.PROJECTIONS:
                shapes[moe.hub_experts[projection].format(layer=layer, expert=expert)] = of[projection]
    return shapes


def _final_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    final = {key: value for key, value in config.items() if key != "torch_dtype"}
    return as_published(final) | {"dtype": str(dtype).removeprefix("torch.")}
