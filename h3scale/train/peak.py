"""The operations a second that MFU is a share of, and where the number comes from."""

import time
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist

# bf16 tensor cores, dense, as NVIDIA's data sheets say; SXM modules where a name has no suffix. The first that fits counts.
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
)
SIZES = {"cuda": 8192, "cpu": 512}  # of the matrices that are multiplied to measure
TRIES = 5


@dataclass(frozen=True)
class Peak:
    """`flops` a second of one rank's device, the mean where they differ; `source` says whose number that is."""

    flops: float
    source: str

    def __str__(self) -> str:
        size, unit = (1e12, "TFLOP/s") if self.flops >= 1e12 else (1e9, "GFLOP/s")
        return f"{self.flops / size:.0f} {unit} ({self.source})"


def peak_of(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> Peak:
    """What the recipe says, else the data sheet's number, else a measured one. Every rank calls this.

    What is measured is measured by all ranks, also by one whose device is in the table when another's is not.
    """
    if given_tflops:
        return Peak(given_tflops * 1e12, "tracking.peak_tflops")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name)
    known = [flops for flops in map(known_peak, names) if flops]
    if len(known) == len(names):
        return Peak(fmean(known), f"{', '.join(dict.fromkeys(names))}, bf16 dense")
    size = SIZES.get(device.type, SIZES["cpu"])
    named = ", ".join(dict.fromkeys(names))
    return Peak(
        _measured(device, dtype, size), f"{named}, measured: {str(dtype).removeprefix('torch.')} product of {size} x {size}"
    )


def known_peak(name: str) -> float | None:
    """Of a device by torch.cuda.get_device_name; None for one that is not in the table."""
    return next((flops for known, flops in PEAKS if known in name), None)


def _measured(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of some tries, mean over the ranks: all measure at once, as they train at once and may share cores."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    dist.barrier()
    best = 0.0
    for _ in range(TRIES):
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    mean = torch.tensor([best / dist.get_world_size()], device=device, dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean)
