"""What a step did, as one line: losses per target token, routing per alignment, experts' load, speed, time, memory."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.log import logger
from h3scale.train.timing import ALL_TO_ALL, PHASES, StepClock
from h3scale.train.trackers import JsonLines, Tracker
from h3scale.train.watch import Watch

# The losses of a line, in order, and the count of the global batch that the sum is divided by; None: it is divided already.
LOSSES = {"lm": "targets", "router": "votes", "router_z": "votes", "router_balance": "votes", "drift": None}
GIB = 2**30
HELD_OUT = "heldout/"  # begins the names of figures of held-out records
OWN = (*PHASES, ALL_TO_ALL, "memory_gib")  # figures of one rank each, which are not added up


class Metrics:
    """Adds up sums of micro-batches, then of ranks, and hands the line to `metrics.jsonl` and the trackers of rank 0.

    Every figure of a line is of the whole global batch: `lm` and `lm/ALIGNMENT` nats per (weighted) target token, `router` and
    `router/ALIGNMENT` nats per voting token and layer, `router_z` and `router_balance` those losses likewise,
    `router_accuracy/ALIGNMENT` share of its voting tokens, `drift` as defined in train.anchor and train.activation_drift,
    `tokens_per_expert/EXPERT` choices of prompt and response tokens over all layers. `seconds/PHASE` and `memory_gib` are those
    of the rank that has most. docs/metrics.md has them all.
    """

    def __init__(
        self,
        path: Path,
        alignments: list[str],
        device: torch.device,
        experts: Sequence[str] = (),
        peak_flops: float | None = None,
        watch: Watch | None = None,
    ):
        self.alignments, self.device, self.experts = alignments, device, list(experts)
        self.peak_flops = peak_flops  # of one rank's device
        self.trackers: list[Tracker] = [JsonLines(path)] if dist.get_rank() == 0 else []
        self.watch = watch if dist.get_rank() == 0 else None
        self.sums: dict[str, Tensor] = {}
        self.clock = StepClock(device)
        self.began = time.monotonic()

    def start(self) -> None:
        """Time counts from here."""
        self.began = time.monotonic()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds the sums of one micro-batch, tensors of any shape; they stay on their device."""
        values = {name: value.detach().to(self.device, torch.float64) for name, value in sums.items()}
        known = [name for name in values if name in self.sums]
        if known:  # all by one kernel
            added = torch._foreach_add([self.sums[name] for name in known], [values[name] for name in known])
            values |= zip(known, added, strict=True)
        self.sums |= values

    def close_step(
        self, step: int, targets: float, votes: int, tokens: int, extra: dict[str, Any], flops: int = 0
    ) -> dict[str, Any]:
        """Reduces over the ranks (every rank calls this), tells the trackers, gives the line; what is not finite is not in it.

        `tokens`: prompt and response tokens of the global batch. `flops`: what its model needs (model.flops), 0 if unknown.
        """
        sums, own = self._reduce()
        now = time.monotonic()
        seconds = now - self.began
        self.began = now
        counts = {"targets": targets, "votes": votes, None: 1}
        line: dict[str, Any] = {"step": step}
        line |= {name: sums[name].item() / counts[per] for name, per in LOSSES.items() if name in sums}
        line |= by_alignment(sums, self.alignments)
        if self.experts and "tokens_per_expert_LE" in sums:
            line |= expert_load(sums["tokens_per_expert_LE"], self.experts)
        line |= extra | {"targets": targets, "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1), "seconds": seconds}
        if flops and self.peak_flops:
            line["mfu"] = flops / (seconds * dist.get_world_size() * self.peak_flops)
        line |= own
        self._drop_not_finite(step, line)
        if self.watch:
            line |= self.watch.take(line)
        self._write(step, line)
        return line

    def held_out(self, step: int, figures: dict[str, float]) -> None:
        """A line of its own for what held-out records say after a step; what is not finite is not in it."""
        line: dict[str, Any] = {"step": step, **figures}
        self._drop_not_finite(step, line)
        self._write(step, line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time counts for no step."""
        began = time.monotonic()
        with self.clock.ignored():
            yield
        self.began += time.monotonic() - began

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _reduce(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Sums over the ranks, and the greatest of each rank's own figures; one all-reduce for both.

        Each rank writes its own figures into a row of its own and zeros into the others', so that adding gathers them.
        """
        seconds = self.clock.close()
        own = torch.zeros(dist.get_world_size(), len(OWN), dtype=torch.float64)
        memory = memory_bytes(self.device) / GIB
        own[dist.get_rank()] = torch.tensor([*(seconds.get(name, 0.0) for name in OWN[:-1]), memory])
        parts = {name: self.sums[name] for name in sorted(self.sums)} | {"own": own.to(self.device)}
        flat = torch.cat([part.flatten() for part in parts.values()])
        dist.all_reduce(flat)
        pieces = flat.cpu().split([part.numel() for part in parts.values()])
        sums = {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}
        self.sums = {}
        greatest = dict(zip(OWN, sums.pop("own").amax(0).tolist(), strict=True))
        times = {f"seconds/{name}": round(greatest[name], 5) for name in OWN[:-1] if name in PHASES or greatest[name]}
        return sums, {**times, "memory_gib": round(greatest["memory_gib"], 3)}

    def _write(self, step: int, line: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.write(step, line)

    def _drop_not_finite(self, step: int, line: dict[str, Any]) -> None:
        """JSON knows no NaN. Of a skipped step the guard has said what matters."""
        for name in [name for name, value in line.items() if not math.isfinite(value)]:
            value = line.pop(name)
            if dist.get_rank() == 0 and "skipped" not in line:
                logger.warning("step %d: %s is %s", step, name, value)


def by_alignment(sums: dict[str, Tensor], alignments: Sequence[str]) -> dict[str, float]:
    """lm, router loss and router accuracy of each alignment from the sums over all ranks; nothing of one without tokens."""
    line = {}
    for a, alignment in enumerate(alignments):
        if sums.get(f"targets/{alignment}"):
            line[f"lm/{alignment}"] = (sums[f"lm/{alignment}"] / sums[f"targets/{alignment}"]).item()
        if "votes_A" in sums and sums["votes_A"][a]:
            line[f"router/{alignment}"] = (sums["router_A"][a] / sums["votes_A"][a]).item()
            line[f"router_accuracy/{alignment}"] = (sums["routed_A"][a] / sums["votes_A"][a]).item()
    return line


def expert_load(counts_LE: Tensor, experts: Sequence[str]) -> dict[str, float]:
    """Tokens of each expert over all layers, and the busiest expert's share of a layer's mean load.

    1 is even, the number of experts the worst there is; `load_max_over_mean` is the mean over layers, `..._worst_layer` the worst.
    """
    ratio_L = counts_LE.amax(-1) / counts_LE.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    totals = counts_LE.sum(0).to(torch.int64).tolist()
    return {
        **{f"tokens_per_expert/{name}": total for name, total in zip(experts, totals, strict=True)},
        "load_max_over_mean": ratio_L.mean().item(),
        "load_max_over_mean_worst_layer": ratio_L.max().item(),
    }


def memory_bytes(device: torch.device) -> int:
    """The most that tensors have taken on a GPU so far; on a CPU what the process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
