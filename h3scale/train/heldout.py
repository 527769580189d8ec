"""What a model in training makes of held-out records: NLL per target token and router accuracy by alignment."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.config.recipe import TrainRecipe
from h3scale.model.router import membership_AE
from h3scale.train.engine import Run
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.metrics import HELD_OUT, by_alignment
from h3scale.train.records import HeldOut

UNSCALED = Counts(1.0, 1)  # only the sums are used


@torch.no_grad()
def score(recipe: TrainRecipe, run: Run, held_out: HeldOut) -> dict[str, float]:
    """`heldout/lm/ALIGNMENT`, `heldout/router_accuracy/ALIGNMENT`, ... as a step's line has them, and `heldout/lm`, their mean.

    Each alignment counts the same in the mean, however many records it has. Every rank calls this, computes its share of the
    rows and gets the same numbers; they do not depend on how many ranks there are, but for rounding.
    """
    began = time.monotonic()
    member_AE = membership_AE(run.expert_map, run.engine.device) if run.expert_map else None
    sums: dict[str, Tensor] = {}
    run.engine.eval()
    for rows in rows_of_rank(held_out, run.rank, run.world_size, recipe.rows_per_micro_batch):
        batch = held_out.tensors(rows, run.tokenizer.pad_token_id or 0).to(run.engine.device)
        losses = compute_losses(run.engine, batch, UNSCALED, recipe.router, held_out.alignments, member_AE, parts=1)
        for name, value in losses.sums.items():
            sums[name] = sums.get(name, 0) + value.to(torch.float64)
    run.engine.train()
    figures = by_alignment(_over_ranks(sums), held_out.alignments)
    figures = {name: value for name, value in figures.items() if not name.startswith("router/")} | {
        "lm": sum(figures[f"lm/{alignment}"] for alignment in held_out.alignments) / len(held_out.alignments),
        "seconds": round(time.monotonic() - began, 3),
    }
    return {f"{HELD_OUT}{name}": value for name, value in figures.items()}


def rows_of_rank(held_out: HeldOut, rank: int, world_size: int, rows_per_micro_batch: int) -> list[list]:
    """The micro-batches of one rank: as many and as large on every rank, since a forward is a collective. Some rows are empty."""
    per_round = rows_per_micro_batch * world_size
    missing = -len(held_out.rows) % per_round
    rows = [*held_out.rows, *[[]] * missing]
    return [rows[i : i + rows_per_micro_batch] for i in range(rank * rows_per_micro_batch, len(rows), per_round)]


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks, on the CPU, by one all-reduce."""
    names = sorted(sums)
    flat = torch.cat([sums[name].flatten() for name in names])
    dist.all_reduce(flat)
    pieces = flat.cpu().split([sums[name].numel() for name in names])
    return {name: piece.view(sums[name].shape) for name, piece in zip(names, pieces, strict=True)}
