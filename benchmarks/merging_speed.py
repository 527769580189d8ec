"""Gram matrices, eigenvectors and SVDs of one matrix, and TSV-M of three whole ones beside the published path of full SVDs.

Shape suffixes: O rows, I columns, S the shorter of the two.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, said
from moe_speed import clock, device, timed
from torch import Tensor

from h3scale.config.merge import OPTIONS
from h3scale.merge.delta import dense
from h3scale.merge.registry import merged_delta

NUM_MODELS = 3
POWER = -0.5  # singular values fall as this power of their number
SHAPES = {"cuda": (4096, 11008), "cpu": (512, 1376)}  # on a GPU an FFN matrix of Llama-2-7B
TINY = (48, 130)
OURS, PUBLISHED = "h3scale, TSV-M", "torch.linalg.svd, TSV-M"
FAR = 1e-2  # between the two: full SVDs in fp32 are not exact


def kernels(tiny: bool, work: Path) -> Iterator[Row]:
    """The fast ones first. One that torch cannot do here is a line; of ours it is an error."""
    deltas = _deltas(TINY if tiny else SHAPES[device()])
    one_OI = deltas[0]
    double_OI = one_OI.double()
    gram_SS = double_OI @ double_OI.T
    options = OPTIONS["tsv_m"].model_validate({})
    like = torch.empty(one_OI.shape, device="meta")
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found[OURS] = dense(merged_delta("tsv_m", like, deltas, options))

    def published() -> None:
        found[PUBLISHED] = published_tsv_m(deltas)

    works: dict[str, Callable[[], Any]] = {
        "Gram matrix, fp32": lambda: one_OI @ one_OI.T,
        "Gram matrix, fp64": lambda: double_OI @ double_OI.T,
        "eigh of the Gram matrix, fp64": lambda: torch.linalg.eigh(gram_SS),
        OURS: ours,
        "torch.linalg.svd, fp32": lambda: torch.linalg.svd(one_OI, full_matrices=False),
        PUBLISHED: published,
    }
    best: dict[str, float] = {}
    for name, each in works.items():
        row: Row = {"what": name, "shape": f"{one_OI.shape[0]} x {one_OI.shape[1]}"}
        try:
            timing = timed({name: each}, 1, gpu_rounds=1 if "svd" in name else 3, warm=0 if name == PUBLISHED else 1)[name]
        except Exception as error:
            if name == OURS:
                raise
            yield row | {"not_run": said(error)}
            continue
        best[name] = timing.best(clock())
        if name == PUBLISHED:
            row |= {"apart": _far(found[OURS], found[PUBLISHED]), "h3scale_is_faster": best[name] / best[OURS]}
        yield row | timing.figures()


def _deltas(shape: tuple[int, int]) -> list[Tensor]:
    """Changes of full rank, made on the device: on one CPU thread their orthogonal vectors would take minutes."""
    generator = torch.Generator(device()).manual_seed(0)
    short = min(shape)
    values_S = (1 + torch.arange(short, device=device())) ** POWER
    found = []
    for _ in range(NUM_MODELS):
        left, right = (torch.linalg.qr(torch.randn(size, short, generator=generator, device=device()))[0] for size in shape)
        found.append(left * values_S @ right.T)
    return found


def published_tsv_m(deltas: Sequence[Tensor]) -> Tensor:
    """As its authors publish it (compute_and_sum_svd_mem_reduction), restated: five full SVDs for three models."""
    rank = min(deltas[0].shape)
    count = rank // len(deltas)
    left, right = (torch.zeros(size, rank, device=deltas[0].device) for size in deltas[0].shape)
    values = torch.zeros(rank, device=deltas[0].device)
    for number, delta in enumerate(deltas):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        place = slice(number * count, (number + 1) * count)
        left[:, place], values[place], right[:, place] = u[:, :count], s[:count], v[:count].T
    u_left, _, v_left = torch.linalg.svd(left, full_matrices=False)
    u_right, _, v_right = torch.linalg.svd(right.T, full_matrices=False)
    return u_left @ v_left @ torch.diag(values) @ u_right @ v_right


def _far(found: Tensor, wanted: Tensor) -> float:
    far = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not far < FAR:
        raise AssertionError(f"TSV-M is {far:.2g} from that of full SVDs")
    return far
