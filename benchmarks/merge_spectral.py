"""TSV-M and RESM on one matrix of three models: beside the published path of full SVDs, and against one of fp64."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import Row, interleaved
from merge_models import SIZES, TINY
from torch import Tensor

from h3scale.config.merge import OPTIONS, Resm
from h3scale.merge.delta import Delta, LowRank, dense
from h3scale.merge.registry import merged_delta
from h3scale.merge.resm import ranks_of, traits_of

ROUNDS = 3
FAST = 10
LARGER = ((2048, 2048), (2048, 8192))  # of Llama-3.2-1B; larger ones take the published path minutes each
NUM_MODELS, RANK = 3, 8
POWERS = (-0.5, -1.0, -2.0)  # of dense deltas' singular values, by their number
SIZES_OF_CHANGE = (0.02, 0.005)  # of LoRA's factors: 6% and 0.4% of the weights that they are stored in
WEIGHT = 0.02  # an entry of those, typically
METHODS = ("tsv_m", "resm")
PUBLISHED = "torch.linalg.svd"


def spectral(size: str, work: Path, peer: Path | None) -> Row:
    """CPU seconds for one matrix, dense deltas and LoRA's; LoRA's beside the same published path, which needs the product."""
    torch.set_num_threads(1)
    rows = _timed(_shape(size), 1 if size == TINY else ROUNDS)
    for shape in LARGER if size != TINY else ():
        rows += _timed(shape, 1)
    return {"rows": rows}


def _timed(shape: tuple[int, int], rounds: int) -> list[Row]:
    """Warm if there is more than one round."""
    rows = []
    for kind, deltas in (("dense", _dense(shape)), (f"LoRA rank {RANK}", _lora(shape))):
        for method in METHODS:
            ours, theirs = _ours(method, deltas), _published(method, deltas)
            for work in (ours, theirs) if rounds > 1 else (ours,):
                work()
            timed = interleaved({"theirs": theirs, "ours": ours}, rounds)
            if kind != "dense":  # milliseconds beside seconds: more of them cost nothing
                timed |= interleaved({"ours": ours}, rounds * FAST)
            for name, what in (("ours", f"h3scale, {method}"), ("theirs", f"{PUBLISHED}, {method}")):
                row = {"what": what, "deltas": kind, "shape": f"{shape[0]} x {shape[1]}", **timed[name].figures()}
                rows.append(row | ({"faster_than_svd": timed["theirs"].best() / timed["ours"].best()} if name == "ours" else {}))
    return rows


def oracle(size: str, work: Path, peer: Path | None) -> Row:
    """Relative Frobenius distance of the merged change from one of fp64 full SVDs; of the published path in fp32 as well.

    The oracle has no triplets of singular value 0, whose vectors any SVD makes up: LoRA deltas have mostly such. Deltas of several
    spectra; of LoRA's that were merged into fp32 weights and are what is left of them, also how far from the same merge of factors.
    """
    torch.set_num_threads(1)
    shape = _shape(size)
    kinds: dict[str, Sequence[Delta]] = {f"dense, k^{power:g}": _dense(shape, power) for power in POWERS}
    kinds[f"LoRA rank {RANK}"] = _lora(shape)
    factors: dict[str, Sequence[Delta]] = {
        f"LoRA rank {RANK} in fp32 weights, factors of {c:g}": _lora(shape, c) for c in SIZES_OF_CHANGE
    }
    rows = []
    for kind, deltas in (kinds | {kind: _stored(each) for kind, each in factors.items()}).items():
        for method in METHODS:
            exact = _published(method, deltas, torch.float64, only_present=True)()
            unstored = dense(_ours(method, factors[kind])()) if kind in factors else None
            for what, found in (
                (f"h3scale, {method}", _ours(method, deltas)()),
                (f"{PUBLISHED}, {method}", _published(method, deltas)()),
            ):
                row = {"what": what, "deltas": kind, "shape": f"{shape[0]} x {shape[1]}", "error": _far(dense(found), exact)}
                rows.append(row | ({} if unstored is None else {"from_factors": _far(dense(found), unstored)}))
    worst = {what: max(row["error"] for row in rows if row["what"] == what) for what in dict.fromkeys(row["what"] for row in rows)}
    return {"rows": rows, "worst": worst}


def _far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _shape(size: str) -> tuple[int, int]:
    """Of the largest matrices in a layer."""
    return SIZES[size][:2]


def _dense(shape: tuple[int, int], power: float = POWERS[0]) -> list[Tensor]:
    """Changes of full rank whose singular values fall as a power."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(NUM_MODELS):
        left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))[0]
        right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))[0]
        found.append(left * (1 + torch.arange(min(shape))) ** power @ right.T)
    return found


def _lora(shape: tuple[int, int], scale: float = SIZES_OF_CHANGE[0]) -> list[LowRank]:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(shape[0], RANK, generator=generator), torch.randn(RANK, shape[1], generator=generator))
        for _ in range(NUM_MODELS)
    ]
    return [LowRank(scale * left, scale * right) for left, right in pairs]


def _stored(factors: Sequence[Delta]) -> list[Tensor]:
    """What is left of changes that were added to fp32 weights."""
    weights = WEIGHT * torch.randn(factors[0].shape, generator=torch.Generator().manual_seed(1))
    return [(weights + dense(each)) - weights for each in factors]


def _ours(method: str, deltas: Sequence[Delta]) -> Callable[[], Delta]:
    like = torch.empty(deltas[0].shape, device="meta")
    options = OPTIONS[method].model_validate({})

    def work() -> Delta:
        return merged_delta(method, like, deltas, options)

    return work if all(isinstance(delta, LowRank) for delta in deltas) else lambda: dense(work())  # type: ignore[return-value]


def _published(
    method: str, deltas: Sequence[Delta], dtype: torch.dtype = torch.float32, only_present: bool = False
) -> Callable[[], Tensor]:
    """TSV-M as its authors publish it (compute_and_sum_svd_mem_reduction), restated; RESM with our weights and ranks before it.

    Theirs always has `rank // models` triplets a model, at places i * that; with RESM's ranks they follow one another.
    """

    def work() -> Tensor:
        changes = [dense(_in(delta, dtype)) for delta in deltas]
        rank = min(changes[0].shape)
        weights, counts = [1.0] * len(changes), [rank // len(changes)] * len(changes)
        if method == "resm":
            options = Resm.model_validate({})
            traits = [traits_of(change, options) for change in changes]
            counts = ranks_of(traits, rank, changes[0].numel(), options)
            total = sum(trait.outlier_share for trait in traits)
            weights = [len(traits) * trait.outlier_share / total for trait in traits]
        left_sum, right_sum = (torch.zeros(size, rank, dtype=dtype) for size in changes[0].shape)
        values = torch.zeros(rank, dtype=dtype)
        at = 0
        for change, weight, count in zip(changes, weights, counts, strict=True):
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            if only_present:
                count = min(count, int((s > s[0] * max(change.shape) * torch.finfo(dtype).eps).sum()))
            place = slice(at, at + count)
            left_sum[:, place], values[place], right_sum[:, place] = u[:, :count], weight * s[:count], v[:count].T
            at += count
        u_left, _, v_left = torch.linalg.svd(left_sum, full_matrices=False)
        u_right, _, v_right = torch.linalg.svd(right_sum.T, full_matrices=False)
        return u_left @ v_left @ torch.diag(values) @ u_right @ v_right

    return work


def _in(delta: Delta, dtype: torch.dtype) -> Delta:
    """In this format before its entries are made."""
    return LowRank(delta.left_OR.to(dtype), delta.right_RI.to(dtype)) if isinstance(delta, LowRank) else dense(delta).to(dtype)
