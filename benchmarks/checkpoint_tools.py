"""What turns a checkpoint into a model, as processes that import once and then wait: python checkpoint_tools.py WAY FOLDER.

A question is a JSON object with what that way needs, and `folder` when it is about another one; the answer has its seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from measure import Row
from ranks import serve, timed

OURS, ZERO_TO_FP32, UNIVERSAL, DCP = "h3scale", "zero_to_fp32", "ds_to_universal", "torch DCP"
FLOOR = "cp"
TAG = "deepspeed"
DCP_SHARDS = "dcp"  # the folder of what FSDP would have saved
HASH_THREADS = 2
HASH_BLOCK = 1 << 20


def _ours(folder: Path) -> Callable[[Row], Any]:
    from h3scale.checkpoint.consolidate import consolidate

    def work(question: Row) -> None:
        dtype = getattr(torch, question["dtype"])
        more = {"receipt": "receipt.json" if question.get("receipt") else None, "fsync": False}
        consolidate(folder / TAG, question["out"], config_from=folder / "model", dtype=dtype, **more)

    return work


def _zero_to_fp32(folder: Path) -> Callable[[Row], Any]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    def work(question: Row) -> None:
        dtype = getattr(torch, question["dtype"])
        convert_zero_checkpoint_to_state_dict(
            str(folder), question["out"], dtype=dtype, max_shard_size="5GB", safe_serialization=True, tag=TAG
        )

    return work


def _universal(folder: Path) -> Callable[[Row], Any]:
    """DeepSpeed's converter, then the simplest assembly: every fp32.pt loaded, experts parted, one safetensors file."""
    from types import SimpleNamespace

    from deepspeed.checkpoint.ds_to_universal import main
    from safetensors.torch import save_file

    from h3scale.checkpoint.expected import expected_shapes, stored_as

    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    shapes = expected_shapes(config, folder)

    def work(question: Row) -> None:
        out = Path(question["out"])
        asked = {"num_extract_workers": 2, "num_merge_workers": 2, "keep_temp_folder": False, "strict": True}
        main(
            SimpleNamespace(
                input_folder=str(folder / TAG), output_folder=str(out / "universal"), inject_missing_state=False, **asked
            )
        )
        stored: dict[str, torch.Tensor] = {}
        tensors = {}
        for name, shape in shapes.items():
            source, expert = stored_as(name, config["model_type"])
            if source not in stored:
                found = torch.load(out / "universal" / "zero" / source / "fp32.pt", weights_only=True)
                stored[source] = found["param"] if isinstance(found, dict) else found
            tensors[name] = (stored[source] if expert is None else stored[source][expert]).reshape(shape).contiguous()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return work


def _dcp(folder: Path) -> Callable[[Row], Any]:
    """torch's consolidation of what FSDP's ranks save as safetensors; its threads share out files, so there are as many."""
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    with safe_open(next((folder / DCP_SHARDS).glob("*.safetensors")), framework="pt") as shard:
        sizes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118 (no mapping)
    num_threads = len(os.sched_getaffinity(0))
    whole, done, files = sum(prod(shape) for shape in sizes.values()), 0, {}
    for name, shape in sizes.items():  # files of equal size
        files[name] = 1 + done * num_threads // whole
        done += prod(shape)

    def work(question: Row) -> None:
        Path(question["out"]).mkdir()
        consolidate_safetensors_files(str(folder / DCP_SHARDS), question["out"], files, num_threads)

    return work


def _floor(folder: Path) -> Callable[[Row], Any]:
    """`cp` of the files that the question names, and where it asks for it their sha256 on two threads."""

    def work(question: Row) -> None:
        Path(question["out"]).mkdir()
        subprocess.run(["cp", *question["files"], question["out"]], check=True)
        if question.get("hash"):
            _hash_all([Path(file) for file in question["files"]])

    return work


def _hash_all(files: list[Path]) -> None:
    halves = [(file, i * -(-file.stat().st_size // HASH_THREADS)) for file in files for i in range(HASH_THREADS)]

    def half(file: Path, start: int) -> None:
        found, left = sha256(), -(-file.stat().st_size // HASH_THREADS)
        with file.open("rb", buffering=0) as opened:
            opened.seek(start)
            while left > 0 and (block := opened.read(min(HASH_BLOCK, left))):
                found.update(block)
                left -= len(block)

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        list(pool.map(half, *zip(*halves, strict=True)))


WAYS = {OURS: _ours, ZERO_TO_FP32: _zero_to_fp32, UNIVERSAL: _universal, DCP: _dcp, FLOOR: _floor}


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # ds_to_universal forks its workers, and a fork of a process with OpenMP's threads hangs
    torch.set_num_threads(1 if way == UNIVERSAL else len(os.sched_getaffinity(0)))
    work = WAYS[way](folder)

    def answer(text: str) -> Row:
        question = json.loads(text)
        shutil.rmtree(question["out"], ignore_errors=True)
        asked = WAYS[way](Path(question["folder"])) if "folder" in question else work
        return timed(lambda: asked(question) or {})

    serve(answer)


if __name__ == "__main__":
    main()
