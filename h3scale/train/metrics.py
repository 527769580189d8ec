"""What a step did, as one JSON line: losses per target token, routing per alignment, experts' load, speed."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.errors import DivergedError


class Metrics:
    """Adds up sums of micro-batches, then of ranks, and writes `metrics.jsonl` on rank 0.

    Every figure of a line is of the whole global batch: `lm` and `lm/ALIGNMENT` nats per (weighted) target token, `router` nats per
    voting token and layer, `router_accuracy/ALIGNMENT` share of its voting tokens, `drift` as defined in train.anchor.
    """

    def __init__(self, path: Path, alignments: list[str], device: torch.device):
        self.path, self.alignments, self.device = path, alignments, device
        self.sums: dict[str, Tensor] = {}
        self.began = time.monotonic()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds the sums of one micro-batch (or any further number of this step)."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()

    def close_step(self, step: int, targets: float, votes: int, tokens: int, extra: dict[str, Any]) -> dict[str, Any]:
        """Reduces over the ranks (every rank calls this) and writes the line; gives it. DivergedError (76) on NaN."""
        names = sorted(self.sums)
        totals = torch.stack([self.sums[name] for name in names]).to(self.device)
        dist.all_reduce(totals)
        sums = dict(zip(names, totals.tolist(), strict=True))
        self.sums = {}
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, "lm": sums["lm"] / targets}
        for alignment in self.alignments:
            if sums.get(f"targets/{alignment}"):
                line[f"lm/{alignment}"] = sums[f"lm/{alignment}"] / sums[f"targets/{alignment}"]
            if sums.get(f"votes/{alignment}"):
                line[f"router_accuracy/{alignment}"] = sums[f"routed/{alignment}"] / sums[f"votes/{alignment}"]
        if "router" in sums:
            line["router"] = sums["router"] / votes
        if "drift" in sums:
            line["drift"] = sums["drift"]
        line.update(extra, targets=targets, tokens=tokens, tokens_per_s=round(tokens / (now - self.began), 1))
        self.began = now
        broken = [name for name in ("lm", "router", "drift") if not math.isfinite(line.get(name, 0))]
        if broken:
            raise DivergedError([f"step {step}: {name} is {line[name]} (try a lower optimizer.learning_rate)" for name in broken])
        if dist.get_rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line
