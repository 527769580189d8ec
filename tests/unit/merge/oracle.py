"""Every method once more, as plainly as its paper says it: fp64, full SVDs, sorting, loops over entries."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from h3scale.config import merge as options_of
from h3scale.merge.chance import chances

Deltas = list[Tensor]


def linear(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)  # type: ignore[return-value]


def task_arithmetic(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def slerp(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    one, other = ((base + delta).flatten() for delta in deltas)
    cosine = torch.dot(one / one.norm(), other / other.norm()).clamp(-1, 1)
    t = options.t
    if abs(cosine) > 0.9995:
        mixed = (1 - t) * one + t * other
    else:
        angle = math.acos(cosine)
        mixed = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)
    return mixed.view(base.shape) - base


def elect(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).flatten(1)
    out = torch.zeros(weighted.shape[1], dtype=torch.float64)
    for i in range(weighted.shape[1]):
        total = float(weighted[:, i].sum())
        agreeing = [m for m in range(len(deltas)) if float(weighted[m, i]) * total > 0]
        if agreeing:
            out[i] = sum(float(weighted[m, i]) for m in agreeing) / sum(weights[m] for m in agreeing)
    return out.view(deltas[0].shape)


def between(delta: Tensor, smallest: int, largest: int) -> Tensor:
    """Without so many of the smallest and of the largest magnitudes."""
    order = delta.flatten().abs().argsort()
    kept = order[smallest : len(order) - largest]
    return torch.zeros(delta.numel(), dtype=delta.dtype).index_copy(0, kept, delta.flatten()[kept]).view(delta.shape)


def ties(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    kept = max(1, int(options.density * base.numel()))
    return elect([between(delta, base.numel() - kept, 0) for delta in deltas], weights)


def dropped(deltas: Deltas, options: Any) -> Deltas:
    drawn = [chances(delta.numel(), options.seed, "", str(m)).view(delta.shape) for m, delta in enumerate(deltas)]
    return [torch.where(u < options.density, d / options.density, 0.0) for u, d in zip(drawn, deltas, strict=True)]


def dare(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    return task_arithmetic(base, dropped(deltas, options), weights, options)


def dare_ties(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    return elect(dropped(deltas, options), weights)


def della(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    left = []
    for m, delta in enumerate(deltas):
        drawn = chances(delta.numel(), options.seed, "", str(m)).view(delta.shape).reshape(-1, delta.shape[-1])
        rows = delta.reshape(-1, delta.shape[-1])
        out = torch.zeros_like(rows)
        for r, row in enumerate(rows):
            for rank, i in enumerate(row.abs().argsort(stable=True).tolist()):
                stays = options.density - options.window + 2 * options.window * rank / (len(row) - 1)
                out[r, i] = row[i] / stays if drawn[r, i] < stays else 0.0
        left.append(out.view(delta.shape))
    return elect(left, weights)


def breadcrumbs(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    kept = max(1, int(options.density * base.numel()))
    above = min(int(options.outliers * base.numel()), base.numel() - kept)
    return task_arithmetic(base, [between(d, base.numel() - kept - above, above) for d in deltas], weights, options)


def consensus_ta(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    merged = base + sum(weighted)
    needed = sum(((d).abs() > options.mask_threshold * (merged - (base + d)).abs()).long() for d in weighted)
    return torch.where(torch.as_tensor(needed >= options.consensus), merged - base, 0.0)


def model_stock(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    pairs = list(itertools.combinations([delta.flatten() for delta in deltas], 2))
    cosine = sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return max(t, 0.0) * linear(base, deltas, weights, options)


def polar(columns: Tensor) -> Tensor:
    """The nearest orthonormal columns, by full SVD; directions that are not there are left out."""
    u, s, v = torch.linalg.svd(columns, full_matrices=False)
    there = s > 1e-6 * s.max()
    return u[:, there] @ v[there]


def side_by_side(parts: list[tuple[Tensor, Tensor, Tensor]], equal: bool = False) -> Tensor:
    left, values, right = (torch.cat(column, dim=-1) for column in zip(*[(u, s, v.T) for u, s, v in parts], strict=True))
    if equal:
        values = values.mean().expand(len(values))
    return polar(left) @ values.diag() @ polar(right).T


def svd(delta: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    count = min(count, int((s > 1e-9 * s.max()).sum()))
    return u[:, :count], s[:count], v[:count]


def tsv_m(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    rank = max(1, min(base.shape) // len(deltas))
    return side_by_side([svd(w * d, rank) for w, d in zip(weights, deltas, strict=True)])


def iso_c(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    u, s, v = svd(task_arithmetic(base, deltas, weights, options), min(base.shape))
    return s.mean() * u @ v


def iso_cts(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    rank = min(base.shape)
    of_each = min(round((rank - int(rank * options.common_fraction)) / len(deltas)), rank // len(deltas))
    common = svd(task_arithmetic(base, deltas, weights, options), rank - of_each * len(deltas))
    rest = [w * (d - common[0] @ common[0].T @ d) for w, d in zip(weights, deltas, strict=True)]
    own = [svd(delta, of_each) for delta in rest]
    there = [(s > 1e-8 * d.norm()).sum() for (_, s, _), d in zip(own, deltas, strict=True)]  # all else is rounding
    return side_by_side([common, *((u[:, :k], s[:k], v[:k]) for (u, s, v), k in zip(own, there, strict=True))], equal=True)


def wudi(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    """The least-squares problem itself, all models' equations at once: tau D_i^T = (w_i D_i) D_i^T, each over |D_i|."""
    sides = [delta / delta.norm() for delta in deltas]
    known = torch.cat([side.T for side in sides], dim=1)  # tau @ known = wanted
    wanted = torch.cat([w * d @ side.T for w, d, side in zip(weights, deltas, sides, strict=True)], dim=1)
    return torch.linalg.lstsq(known.T, wanted.T, driver="gelsd", rcond=1e-8).solution.T


def resm(base: Tensor, deltas: Deltas, weights: Sequence[float], options: Any) -> Tensor:
    rank = min(base.shape)
    limits = [d.abs().mean() + options.outlier_kappa * d.abs().std(correction=0) for d in deltas]
    if options.outliers == "model":
        mass = [float(d.abs()[d.abs() > limit].sum() / d.abs().sum()) for d, limit in zip(deltas, limits, strict=True)]
        if sum(mass):
            weights = [w * len(deltas) * m / sum(mass) for w, m in zip(weights, mass, strict=True)]
    dense = [int(((d.abs() >= options.sparsity_threshold * d.abs().max()) & (d != 0)).sum()) for d in deltas]
    ranks = [rank // len(deltas)] * len(deltas)
    if options.rank == "sparsity":
        ranks = [rank * each // base.numel() for each in dense]
        ranks = ranks if sum(ranks) <= rank else [rank * each // sum(dense) for each in dense]
    if options.outliers == "element":
        deltas = [torch.minimum(torch.maximum(d, -limit), limit) for d, limit in zip(deltas, limits, strict=True)]
    return side_by_side([svd(w * d, max(1, k)) for w, d, k in zip(weights, deltas, ranks, strict=True)])


ORACLES: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in options_of.OPTIONS}
