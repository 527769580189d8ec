"""Seconds of a consolidation beside those of other tools and of plain copies, and how its memory grows with the model."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from checkpoint_shards import TAG, write_checkpoint
from checkpoint_tools import FLOOR, OURS, UNIVERSAL, ZERO_TO_FP32
from measure import Row
from ranks import Peaks, Ranks
from safetensors import safe_open

from h3scale.checkpoint.shard_files import header_of

SCRIPT = str(Path(__file__).with_name("checkpoint_tools.py"))
ROUNDS = 5
WORLD_SIZE = 4
Case = tuple[str, str, Row]  # what it is called, who does it, what is asked


def dense(tiny: bool, work: Path) -> list[Row]:
    """A dense ZeRO-3 checkpoint: fp32 beside cp of the output, bf16 beside cp of the input, zero_to_fp32 for both."""
    folder = work / "checkpoint"
    num_parameters = write_checkpoint(folder, "tiny" if tiny else "0.3 B", WORLD_SIZE)
    outs = {name: str(work / name.replace(" ", "-").replace(",", "")) for name in _NAMES}
    ask: dict[str, Case] = {
        "h3scale, fp32": (OURS, OURS, {"dtype": "float32"}),
        "h3scale, bf16": (OURS, OURS, {"dtype": "bfloat16"}),
        "h3scale, fp32, receipt": (OURS, OURS, {"dtype": "float32", "receipt": True}),
        "h3scale, bf16, receipt": (OURS, OURS, {"dtype": "bfloat16", "receipt": True}),
        "cp of the output": (FLOOR, FLOOR, {"files": [f"{outs['h3scale, fp32']}/model.safetensors"]}),
        "cp of the output, sha256": (FLOOR, FLOOR, {"files": [f"{outs['h3scale, fp32']}/model.safetensors"], "hash": True}),
        "cp of the input": (FLOOR, FLOOR, {"files": sorted(map(str, (folder / TAG).glob("*_optim_states.pt")))}),
        "zero_to_fp32, fp32": (ZERO_TO_FP32, ZERO_TO_FP32, {"dtype": "float32"}),
        "zero_to_fp32, bf16": (ZERO_TO_FP32, ZERO_TO_FP32, {"dtype": "bfloat16"}),
    }
    timings = _interleaved(folder, {name: (way, asked | {"out": outs[name]}) for name, (_, way, asked) in ask.items()}, tiny)
    for dtype in ("fp32", "bf16"):
        _check_equal(Path(outs[f"h3scale, {dtype}"]), Path(outs[f"zero_to_fp32, {dtype}"]))
    against = {
        "h3scale, fp32": ("cp of the output", "zero_to_fp32, fp32"),
        "h3scale, bf16": ("cp of the input", "zero_to_fp32, bf16"),
        "h3scale, fp32, receipt": ("cp of the output, sha256",),
    }
    return _rows(timings, num_parameters, against)


_NAMES = (
    "h3scale, fp32",
    "h3scale, bf16",
    "h3scale, fp32, receipt",
    "h3scale, bf16, receipt",
    "cp of the output",
    "cp of the output, sha256",
    "cp of the input",
    "zero_to_fp32, fp32",
    "zero_to_fp32, bf16",
)


def experts(tiny: bool, work: Path) -> list[Row]:
    """An AutoEP ZeRO-3 checkpoint with Adam's moments, experts over two ranks and their two replicas."""
    folder = work / "checkpoint"
    num_parameters = write_checkpoint(folder, "tiny" if tiny else "0.1 B", WORLD_SIZE, ep_size=2, adam=True)
    ask = {OURS: (OURS, {"dtype": "float32", "out": str(work / "ours")}), UNIVERSAL: (UNIVERSAL, {"out": str(work / "theirs")})}
    timings = _interleaved(folder, ask, tiny)
    _check_equal(work / "ours", work / "theirs")
    rows = _rows(timings, num_parameters, {OURS: (UNIVERSAL,)})
    weights = (work / "ours" / "model.safetensors").stat().st_size
    for row, out in zip(rows, ("ours", "theirs"), strict=True):
        row["extra_disk_mb"] = (sum(p.stat().st_size for p in (work / out).rglob("*") if p.is_file()) - weights) / 1e6
    return rows


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


def _interleaved(folder: Path, ask: dict[str, tuple[str, Row]], tiny: bool) -> dict[str, list[float]]:
    """Seconds of each round after one that is not counted; the files are in memory from then on."""
    workers = {way: Ranks(SCRIPT, [way, str(folder)]) for way in {way for way, _ in ask.values()}}
    seconds: dict[str, list[float]] = {name: [] for name in ask}
    try:
        for round_number in range(1 + (1 if tiny else ROUNDS)):
            for name, (way, question) in ask.items():
                answer = workers[way].ask(json.dumps(question))[0]
                if round_number:
                    seconds[name].append(answer["wall_s"])
    finally:
        for each in workers.values():
            each.__exit__(None, None, None)
    return seconds


def _rows(seconds: dict[str, list[float]], num_parameters: int, against: dict[str, tuple[str, ...]]) -> list[Row]:
    rows = []
    for name, found in seconds.items():
        row: Row = {"what": name, "parameters": num_parameters, "rounds": len(found), "wall_s_min": min(found)}
        row["wall_s_median"] = statistics.median(found)
        for other in against.get(name, ()):
            is_copy = other.startswith(FLOOR)
            ratio = min(found) / min(seconds[other])
            row["times_cp" if is_copy else "faster_than_peer"] = ratio if is_copy else 1 / ratio
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
