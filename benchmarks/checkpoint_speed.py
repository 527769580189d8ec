"""Seconds of a consolidation beside those of other tools and of plain copies, and how its memory grows with the model."""

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from checkpoint_shards import TAG, write_checkpoint, write_fsdp_shards
from checkpoint_tools import DCP, DCP_SHARDS, FLOOR, OURS, UNIVERSAL, ZERO_TO_FP32
from measure import Row
from ranks import Peaks, Ranks
from safetensors import safe_open

from h3scale.checkpoint.shard_files import WEIGHTS, header_of

SCRIPT = str(Path(__file__).with_name("checkpoint_tools.py"))
ROUNDS = 7
WORLD_SIZE = 4


def dense(tiny: bool, work: Path) -> list[Row]:
    """A dense ZeRO-3 checkpoint: fp32 beside cp of the output, bf16 beside cp of the input, zero_to_fp32 for both.

    torch DCP has the same tensors, sharded as FSDP saves them: it reads no other layout. Those that are compared take turns.
    """
    folder, first = work / "checkpoint", work / "first"
    num_parameters = _with_fsdp_shards(folder, "tiny" if tiny else "0.3 B")
    _with_fsdp_shards(first, "tiny")
    copy = {"files": [str(folder / "output" / WEIGHTS)]}
    ask: dict[str, tuple[str, Row]] = {
        "cp of the output": (FLOOR, copy),
        "h3scale, fp32": (OURS, {"dtype": "float32"}),
        "zero_to_fp32, fp32": (ZERO_TO_FP32, {"dtype": "float32"}),
        "torch DCP, fp32": (DCP, {}),
        "cp of the input": (FLOOR, {"files": sorted(map(str, (folder / TAG).glob("*_optim_states.pt")))}),
        "h3scale, bf16": (OURS, {"dtype": "bfloat16"}),
        "zero_to_fp32, bf16": (ZERO_TO_FP32, {"dtype": "bfloat16"}),
        "cp of the output, sha256 of it": (FLOOR, copy | {"hash": True}),
        "h3scale, fp32, receipt": (OURS, {"dtype": "float32", "receipt": True}),
        "h3scale, bf16, receipt": (OURS, {"dtype": "bfloat16", "receipt": True}),
    }
    equal = [("h3scale, fp32", other) for other in ("zero_to_fp32, fp32", "torch DCP, fp32")]
    seconds, _ = _interleaved(folder, first, ask, [*equal, ("h3scale, bf16", "zero_to_fp32, bf16")], tiny)
    against = {
        "h3scale, fp32": ("cp of the output", "zero_to_fp32, fp32"),
        "h3scale, bf16": ("cp of the input", "zero_to_fp32, bf16"),
        "h3scale, fp32, receipt": ("cp of the output, sha256 of it",),
        "torch DCP, fp32": ("cp of the output",),
    }
    rows = _rows(seconds, num_parameters, against)
    ours, dcp = (min(seconds[name]) for name in ("h3scale, fp32", "torch DCP, fp32"))
    return [row | ({"faster_than_dcp": dcp / ours} if row["what"] == "h3scale, fp32" else {}) for row in rows]


def experts(tiny: bool, work: Path) -> list[Row]:
    """An AutoEP ZeRO-3 checkpoint with Adam's moments, experts over two ranks and their two replicas."""
    folder, first = work / "checkpoint", work / "first"
    write_checkpoint(first, "tiny", WORLD_SIZE, ep_size=2, adam=True)
    num_parameters = write_checkpoint(folder, "tiny" if tiny else "0.05 B", WORLD_SIZE, ep_size=2, adam=True)
    ask = {OURS: (OURS, {"dtype": "float32"}), UNIVERSAL: (UNIVERSAL, {})}
    seconds, sizes = _interleaved(folder, first, ask, [(OURS, UNIVERSAL)], tiny)
    rows = _rows(seconds, num_parameters, {OURS: (UNIVERSAL,)})
    return [row | {"mb_on_disk": sizes[name] / 1e6} for row, name in zip(rows, sizes, strict=True)]


def memory(tiny: bool, work: Path) -> list[Row]:
    """Anonymous memory of a fresh process that consolidates, above what it held after its imports and a tiny model."""
    rows: list[Row] = []
    write_checkpoint(work / "first", "tiny", WORLD_SIZE)
    for size in ("tiny",) if tiny else ("0.05 B", "0.3 B", "1 B"):
        folder = work / "checkpoint"
        num_parameters = write_checkpoint(folder, size, WORLD_SIZE)
        for dtype, receipt in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
            with Ranks(SCRIPT, [OURS, str(folder)]) as ranks:
                before = _memory_before(work, dtype)
                with Peaks(ranks) as peaks:
                    ranks.ask(json.dumps({"dtype": dtype, "receipt": receipt, "out": str(work / "out")}))
                    held = ranks.memory_mib()
            rows.append(
                {
                    "what": f"{OURS}, {dtype}" + (", receipt" if receipt else ""),
                    "parameters": num_parameters,
                    "peak_anon_mib": max(peaks.mib[0], held[0]),
                    "above_tiny_mib": max(peaks.mib[0], held[0]) - before,
                }
            )
            shutil.rmtree(work / "out")
        shutil.rmtree(folder)
    return rows


def _memory_before(work: Path, dtype: str) -> float:
    """The peak of a fresh process that consolidates the tiny model."""
    with Ranks(SCRIPT, [OURS, str(work / "first")]) as ranks, Peaks(ranks) as peaks:
        ranks.ask(json.dumps({"dtype": dtype, "out": str(work / "out")}))
        held = ranks.memory_mib()
    shutil.rmtree(work / "out")
    return max(peaks.mib[0], held[0])


def _with_fsdp_shards(folder: Path, size: str) -> int:
    """Writes a checkpoint, `folder`/output (what cp is to copy) and the same tensors as FSDP saves them."""
    num_parameters = write_checkpoint(folder, size, WORLD_SIZE)
    with Ranks(SCRIPT, [OURS, str(folder)]) as ranks:
        ranks.ask(json.dumps({"dtype": "float32", "out": str(folder / "output")}))
    write_fsdp_shards(folder / DCP_SHARDS, folder / "output" / WEIGHTS, WORLD_SIZE)
    return num_parameters


def _interleaved(
    folder: Path, first: Path, ask: dict[str, tuple[str, Row]], equal: list[tuple[str, str]], tiny: bool
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each round, and bytes that each leaves. Before them a round that is not counted, in which results must be equal.

    Each turn has a process of its own, as a person's would: one that has written a large model before has memory at hand which
    the first must ask the system for. It has done `first`, so that imports do not count. What was written is deleted before
    the next one's turn: else all wait for a disk that none is asked to wait for.
    """
    outs = {name: folder / f"out-{i}" for i, name in enumerate(ask)}

    def turn(name: str) -> float:
        way, asked = ask[name]
        with Ranks(SCRIPT, [way, str(folder)]) as rank:
            rank.ask(json.dumps(asked | {"folder": str(first), "out": str(outs[name])}))
            return float(rank.ask(json.dumps(asked | {"out": str(outs[name])}))[0]["wall_s"])

    seconds = {name: [turn(name)] for name in ask}
    for ours, theirs in equal:
        _check_equal(outs[ours], outs[theirs])
    sizes = {name: sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) for name, out in outs.items()}
    for out in outs.values():
        shutil.rmtree(out)
    os.sync()
    if tiny:
        return seconds, sizes
    for _ in range(ROUNDS):
        for name in ask:
            seconds[name].append(turn(name))
            shutil.rmtree(outs[name])
    return {name: found[1:] for name, found in seconds.items()}, sizes


def _rows(seconds: dict[str, list[float]], num_parameters: int, against: dict[str, tuple[str, ...]]) -> list[Row]:
    rows = []
    for name, found in seconds.items():
        row: Row = {"what": name, "parameters": num_parameters, "rounds": len(found), "wall_s_min": min(found)}
        row["wall_s_median"] = statistics.median(found)
        for other in against.get(name, ()):
            is_copy = other.startswith(FLOOR)
            pairs = [mine / theirs for mine, theirs in zip(found, seconds[other], strict=True)]  # of one round: the load is alike
            for words, ratio in (("", min(found) / min(seconds[other])), ("_in_pairs", statistics.median(pairs))):
                row[("times_cp" if is_copy else "faster_than_peer") + words] = ratio if is_copy else 1 / ratio
        rows.append(row)
    return rows


def _check_equal(ours: Path, theirs: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    one, other = ({name: file for file in each.glob("*.safetensors") for name in header_names(file)} for each in (ours, theirs))
    assert one.keys() == other.keys(), (len(one), len(other))
    for name in one:
        assert torch.equal(_open(one[name]).get_tensor(name), _open(other[name]).get_tensor(name)), name


def header_names(file: Path) -> list[str]:
    """The tensors in a safetensors file."""
    return [name for name in json.loads(header_of(file)[8:]) if name != "__metadata__"]


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")
