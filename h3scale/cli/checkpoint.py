"""h3scale checkpoint: inspect, consolidate, convert, verify, release."""

import enum
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h3scale.errors import UsageError

if TYPE_CHECKING:
    from h3scale.checkpoint.findings import Report

app = typer.Typer(no_args_is_help=True, help="From sharded training checkpoints to a folder fit for publication.")


@app.callback()
def on_the_cpu() -> None:
    """These tools compute on the CPU: DeepSpeed, which transformers imports, need not look for a GPU and say that there is none."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


class Dtype(enum.StrEnum):
    """Number formats a model folder can have."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Layout(enum.StrEnum):
    """What a model can be converted to."""

    hub = "hub"
    fused = "fused"
    autoep = "autoep"
    megablocks = "megablocks"
    dense = "dense"
    universal = "universal"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Source = Annotated[Path, typer.Argument(metavar="SRC", help="A run (its best or newest step), a step, or a DeepSpeed tag folder.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face model folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weights file, such as 5GB or 500MB.")]
ConfigFrom = Annotated[
    Path | None, typer.Option("--config-from", help="Folder with config.json and tokenizer, for a source that has none.")
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Threads; 0: one for each core, up to 8.")]
Receipt = Annotated[str, typer.Option("--receipt", metavar="none|FILE", help="Where to write the receipt; a plain name: in DST.")]
Fsync = Annotated[bool, typer.Option("--fsync/--no-fsync", help="--no-fsync is for measuring.", hidden=True)]


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A model folder, run, step, tag folder, adapter or moe.pt.")],
    config_from: ConfigFrom = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint or model is: kind, step, topology, parameters, number formats, experts, sizes. Reads no values.

    Example: h3scale checkpoint inspect checkpoints/fused
    """
    from h3scale.checkpoint.inspect import inspect as look
    from h3scale.cli.checkpoint_table import print_inspection
    from h3scale.log import logger

    found = look(source, config_from)
    if json_:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print_inspection(found)
    for finding in found.findings:
        logger.warning("warning: %s", finding)


@app.command()
def consolidate(
    source: Source,
    target: Target,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Number format of the weights.")] = Dtype.float32,
    max_shard_size: MaxShardSize = "5GB",
    config_from: ConfigFrom = None,
    only: Annotated[str | None, typer.Option("--only", metavar="PATTERN", help="Tensors to write, such as '*.layers.0.*'.")] = None,
    workers: Workers = 0,
    receipt: Receipt = "receipt.json",
    fsync: Fsync = True,
    force: Force = False,
) -> None:
    """Turn a sharded training checkpoint into one Hugging Face folder (safetensors, hub layout, tokenizer).

    Reads DeepSpeed ZeRO-1, 2 and 3, dense or with experts (AutoEP), and universal checkpoints. Every tensor that the config
    asks for must be there exactly once, or nothing is written. A run that was cut off goes on when the command is repeated.

    Example: h3scale checkpoint consolidate checkpoints/fused models/fused
    """
    max_shard_bytes = parse_size(max_shard_size)
    import torch

    from h3scale.checkpoint.consolidate import consolidate as write_whole

    done = write_whole(
        source,
        target,
        config_from=config_from,
        force=force,
        dtype=getattr(torch, dtype.value),
        max_shard_bytes=max_shard_bytes,
        only=only,
        workers=workers,
        receipt=None if receipt == "none" else receipt,
        fsync=fsync,
    )
    step = "" if done.step is None else f", step {done.step}"
    print(
        f"{done.source}{step}: {done.kind}, {done.num_tensors} tensors, {done.num_parameters:,} parameters of {done.world_size} "
        f"ranks (ep_size {done.ep_size}), {done.num_bytes / 1e6:.1f} MB {dtype.value}, {done.duration_s:.1f} s"
    )
    against = "" if config_from and done.step is None else f" --against {source}"
    print(f"model: {target}   next: h3scale checkpoint verify {target}{against}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="A model folder in any layout, a training checkpoint, a PEFT adapter, or a moe.pt."),
    ],
    target: Target,
    to: Annotated[
        Layout,
        typer.Option("--to", help="The layout to write; dense: one expert alone; universal: DeepSpeed's, with the optimizer."),
    ],
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="NAME", help="With --to dense: an alignment, ALIGNMENT/2, or a number.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Number format of the weights.  [default: as it is]")] = None,
    max_shard_size: MaxShardSize = "5GB",
    config_from: ConfigFrom = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="The model that an adapter changes.  [default: the one it names]")
    ] = None,
    workers: Workers = 0,
    receipt: Receipt = "receipt.json",
    fsync: Fsync = True,
    force: Force = False,
) -> None:
    """Write a model in another layout: hub, transformers' fused, AutoEP, MegaBlocks, or one expert as a dense model.

    Bytes that need no change are copied by the kernel. Every matrix of every expert arrives exactly once, or nothing is
    written. A run that was cut off goes on when the command is repeated.

    Example: h3scale checkpoint convert models/fused models/helpful --to dense --expert helpful
    """
    max_shard_bytes = parse_size(max_shard_size)
    import torch

    from h3scale.checkpoint.convert import convert as write_converted

    done = write_converted(
        source,
        target,
        to=to.value,
        expert=expert,
        config_from=config_from,
        base=base,
        force=force,
        dtype=getattr(torch, dtype.value) if dtype else None,
        max_shard_bytes=max_shard_bytes,
        workers=workers,
        receipt=None if receipt == "none" else receipt,
        fsync=fsync,
    )
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in done.dtypes)
    print(
        f"{done.source}: {done.kind}, {done.num_tensors} tensors, {done.num_parameters:,} parameters, "
        f"{done.num_bytes / 1e6:.1f} MB {dtypes}, {done.duration_s:.1f} s"
    )
    if to is Layout.universal:
        load = f"engine.load_checkpoint('{target.parent}', tag='{target.name}') with checkpoint.load_universal"
        print(f"universal: {target}   next: {load}; frozen weights come from the model that the engine is built with")
        print(f"to check it: h3scale checkpoint verify {target}")
        return
    print(f"model: {target}   next: h3scale checkpoint verify {target}")


@app.command()
def verify(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder in any layout, an adapter, a training checkpoint, a receipt.")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="Another of these: every tensor must be equal.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="With --against: compare what both compute, too.")] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="Read all of a training checkpoint to check its own sha256.")
    ] = True,
    config_from: Annotated[
        Path | None, typer.Option("--config-from", help="Folder with config.json and tokenizer, for a bare DeepSpeed folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check files, names, shapes, values, tokenizer and checksums; with --against, that two models are the same.

    Everything wrong is found in one go. Exit code 0: nothing but warnings, 65: errors, 77: something unsafe. Of a receipt: that
    the model is still what was written, tensor by tensor, and that every expert arrived exactly once.

    Example: h3scale checkpoint verify models/fused --against checkpoints/fused
    """
    if logits and against is None:
        raise UsageError("--logits: compares two models (works: --against OTHER --logits)")
    from h3scale.checkpoint.verify import examine
    from h3scale.log import logger

    report = examine(model, against, logits=logits, hashes=hashes, config_from=config_from)
    if as_json:
        print(json.dumps(report.to_dict()))
        raise typer.Exit(report.exit_code)
    for warning in report.warnings:
        logger.warning("warning: %s", warning)
    report.raise_errors()
    print("\n".join(_checked(report, against)))
    released = f"   next: h3scale checkpoint release {model} release --license LICENSE" if report.kind == "model folder" else ""
    print(f"verified: {model}{released}")


def _checked(report: "Report", against: Path | None) -> Iterator[str]:
    """What has been checked of a model in which nothing is wrong, a line each."""
    if report.num_tensors:
        dtypes = ", ".join(report.dtypes)
        yield f"{report.kind}: {report.num_tensors} tensors, {report.num_parameters:,} parameters, {dtypes}: names, shapes, values"
    if report.num_proven_tensors is not None:
        yield f"receipt: {report.num_proven_tensors} tensors as they were written, each from its own bytes"
    if report.num_sums is not None:
        yield f"checksums: {report.num_sums} files as they were written"
    elif report.num_proven_tensors is None and report.kind == "model folder":
        yield "checksums: none"
    if report.num_equal_tensors is not None:
        yield f"weights: {report.num_equal_tensors} tensors bit for bit those of {against}, as {report.compared_as}"
    if report.max_abs_difference is not None:
        yield f"logits: max abs difference {report.max_abs_difference:.1e} (limit {report.logit_limit:.1e})"


@app.command()
def release(
    model: Model,
    target: Target,
    license: Annotated[str, typer.Option("--license", help="License identifier for the model card, such as apache-2.0.")] = "",
    base_model: Annotated[
        list[str] | None, typer.Option("--base-model", help="Model it was made from; may be given again.")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option("--evaluation", help="JSON of h3scale evaluate, for the card.")] = None,
    force: Force = False,
) -> None:
    """Make a folder fit for publication: verified weights, model card, SHA256SUMS. Nothing is uploaded.

    Example: h3scale checkpoint release models/fused release --license apache-2.0 --evaluation evaluation/fused.json
    """
    from h3scale.checkpoint.release import release as write_release

    write_release(model, target, license=license, base_model=base_model, evaluation=evaluation, force=force)
    print(f"release: {target}   next: h3scale generate {target} 'your prompt'   (publish: hf upload NAME {target})")


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' or '1000000'; UsageError (2) for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip().upper())
    num_bytes = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if num_bytes < 1:
        raise UsageError(f"--max-shard-size: '{text}' (works: 5GB, 500MB, 1000000)")
    return num_bytes
