"""From a training checkpoint to a Hugging Face folder in hub layout: every tensor exactly once, or nothing at all."""

from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.convert import plan_layout
from h3scale.checkpoint.model_writer import Options, Summary, write_model_folder
from h3scale.checkpoint.receipt import sha256
from h3scale.checkpoint.shards import check_output
from h3scale.checkpoint.source_model import open_training
from h3scale.checkpoint.training_checkpoint import find_checkpoint
from h3scale.model.names import HUB

SUMS = "SHA256SUMS"


def consolidate(
    source: str | Path,
    target: str | Path,
    *,
    config_from: str | Path | None = None,
    force: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Summary:
    """Writes a training checkpoint as a Hugging Face folder (config, safetensors, tokenizer) with a receipt; see Options.

    Values come from the optimizer's fp32 partitions (frozen tensors: as trained with) and are rounded to `dtype`, block by
    block. Names, shapes and numbers of tensors must be those that config.json asks for, else DataError (65) lists what is
    missing, unknown or of another shape, and nothing is written. The same call goes on where a killed one was.
    """
    how = Options(dtype=dtype, **options)
    check_output(target, force)
    model = open_training(find_checkpoint(source, config_from))
    return write_model_folder(plan_layout(model, HUB, how), target, how, force, "consolidate")


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS of all files of a folder, in the form `sha256sum -c` reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
