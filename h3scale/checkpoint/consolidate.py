"""From a training checkpoint to a Hugging Face folder in hub layout: every tensor exactly once, or nothing at all."""

import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.extents import Weights
from h3scale.checkpoint.journal import Work, check_space, resumed_folder
from h3scale.checkpoint.lora import open_weights
from h3scale.checkpoint.receipt import RECEIPT, check_disjoint, make_receipt, sha256
from h3scale.checkpoint.shard_files import ShardFile, TensorSpec, plan_shards
from h3scale.checkpoint.shards import TOKENIZER_FILES, check_output, copy_tokenizer, write_descriptions, write_json
from h3scale.checkpoint.stream import Hashes, Output, Writer
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint, find_checkpoint
from h3scale.errors import DataError, UsageError
from h3scale.log import logger, progress
from h3scale.model import names
from h3scale.model.families import as_published, expert_size, num_experts

SUMS = "SHA256SUMS"
GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
MAX_WORKERS = 8  # more threads do not make a disk faster
_LISTED = 20  # findings of one kind that are written out; the rest is counted


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

    @property
    def receipt_is_inside(self) -> bool:
        return Path(str(self.receipt)).name == str(self.receipt)


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
        _copy_extras(checkpoint.model, work.folder, target)
        if how.receipt is not None:
            receipt = make_receipt(work.folder, _about(checkpoint, weights, Path(target), how), shards, outputs, hashes)
            write_json(work.folder / how.receipt if how.receipt_is_inside else Path(how.receipt), receipt)
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


def _copy_extras(model: Path, folder: Path, target: str | Path) -> None:
    """The tokenizer and the generation config, where there are any."""
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        logger.warning("%s: has no tokenizer, so %s has none", model, target)
    copy_tokenizer(model, folder)
    if (model / GENERATION).is_file():
        shutil.copyfile(model / GENERATION, folder / GENERATION)


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
    return {
        "source": str(checkpoint.path),
        "model": "." if how.receipt_is_inside else os.path.relpath(target, Path(str(how.receipt)).parent),
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
