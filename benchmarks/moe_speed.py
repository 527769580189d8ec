"""Forward and backward of a layer of experts, timed in rounds that take turns, beside a dense FFN on the same rows."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import moe_peers as peers
import torch
from measure import Row, Timing, interleaved, said
from moe_peers import DENSE, OURS, Contender, NotHere, Sizes, Weights
from torch import Tensor
from train_models import TOP_K

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROUTER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # a gradient that is a difference
CHECKED_TOKENS = 256
FLOPS_PER_WEIGHT = 6  # forward, and backward by input and by weight, a multiplication and an addition each
MATRICES = 3
ALL = (
    *(OURS, peers.OURS_AUTOEP, peers.EAGER, peers.GROUPED, peers.BATCHED, peers.PUBLISHED, peers.DEEPSPEED),
    *(peers.SPARSE, peers.MEGA_GROUPED),
)
LEFT_OUT = [word for word in os.environ.get("BENCHMARK_WITHOUT", "").split(",") if word]  # as peers' names begin
NEEDED = (OURS, peers.OURS_AUTOEP, DENSE)  # what goes wrong with them is an error, and no line in a table


@dataclass(frozen=True)
class Shape:
    experts: int
    tokens: int
    hidden: int
    inner: int
    dtype: torch.dtype = torch.bfloat16
    load: str = "balanced"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _shapes(tiny: bool) -> list[Shape]:
    """Coarse experts of the sizes that are fused; on a GPU those of Llama-2-7B and Mixtral, and one of fine ones."""
    if tiny:
        return [Shape(3, 24, 64, 96), Shape(3, 24, 64, 96, torch.float32)]
    if device() == "cpu":
        some = [(3, 512), (3, 2048), (8, 512), (8, 2048), (16, 512), (16, 4096)]
        exact = [Shape(experts, 512, 512, 1792, torch.float32) for experts in (3, 8)]
        return [*[Shape(experts, tokens, 512, 1792) for experts, tokens in some], *exact]
    some = [(experts, inner, tokens) for experts in (3, 8) for inner in (11008, 14336) for tokens in (4096, 16384)]
    return [*[Shape(experts, tokens, 4096, inner) for experts, inner, tokens in some], Shape(16, 8192, 4096, 11008), *_fine()]


def _fine() -> list[Shape]:
    return [Shape(64, 16384, 4096, 1024)]


def layer(tiny: bool, work: Path) -> Iterator[Row]:
    """Balanced load at every size."""
    for shape in _shapes(tiny):
        yield from _case(shape, tiny)


def loads(tiny: bool, work: Path) -> Iterator[Row]:
    """The same size with the loads that routers make."""
    size = (24, 64, 96) if tiny else (2048, 512, 1792) if device() == "cpu" else (16384, 4096, 14336)
    for load in ("balanced", "zipf", "worst"):
        yield from _case(Shape(8, *size, load=load), tiny)


def few_tokens(tiny: bool, work: Path) -> Iterator[Row]:
    """As many tokens as a step of generation has, where weights are what has to be read."""
    size = (8, 64, 96) if tiny else (16, 512, 1792) if device() == "cpu" else (16, 4096, 11008)
    for experts in (3, 8):
        yield from _case(Shape(experts, *size), tiny)


def ceilings(tiny: bool, work: Path) -> list[Row]:
    """What this machine can do now: the best of a large product, and of a copy."""
    rows = [matmul(dtype, tiny) for dtype in (torch.bfloat16, torch.float32)]
    source = torch.randn((64 if tiny else 2048) * 2**20 // 4 // (1 if device() == "cuda" else 8), device=device())
    target = torch.empty_like(source)
    timing = timed({"copy": lambda: target.copy_(source)}, 3 if tiny else 20)["copy"]
    rows.append({"what": "copy, read and written", "gb_per_s": 2 * source.nbytes / timing.best(clock()) / 1e9, **timing.figures()})
    return rows


@cache
def matmul(dtype: torch.dtype, tiny: bool) -> Row:
    """Measured once in a process: of it the layers' shares are."""
    size = 256 if tiny else 8192 if device() == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    timing = timed({"matmul": lambda: a @ b}, 3 if tiny else 20)["matmul"]
    tflops = 2 * size**3 / timing.best(clock()) / 1e12
    return {"what": f"matmul {size}^3, {_word(dtype)}", "tflops": tflops, **timing.figures()}


def _case(shape: Shape, tiny: bool) -> Iterator[Row]:
    """A row for each. A peer that computes something else, or has an exception whenever it comes, has the reason in its row."""
    sizes = Sizes(shape.experts, shape.hidden, shape.inner, shape.dtype, device())
    weights = Weights.draw(sizes)
    hidden_TH = peers.tokens(sizes, shape.tokens, shape.load)
    grad_TH = torch.randn_like(hidden_TH)
    checked = slice(min(CHECKED_TOKENS, shape.tokens))
    wanted = peers.reference(weights, hidden_TH[checked], grad_TH[checked])
    about = {"experts": shape.experts, "tokens": shape.tokens, "hidden": shape.hidden, "inner": shape.inner}
    about |= {"dtype": _word(shape.dtype), "load": shape.load}
    contenders: dict[str, Contender] = {}
    reasons: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        if name in NEEDED:  # a CUDA error lasts for the process, so that it may be of one before
            error.add_note(f"{name}, {about}; before it: {reasons or 'all went well'}")
            raise error
        reasons[name] = str(error) if isinstance(error, NotHere) else said(error)
        if name in contenders:
            contenders.pop(name).clear()

    for name in (*ALL, DENSE):
        try:
            if any(name.startswith(word) for word in LEFT_OUT):
                raise NotHere("left out")
            contenders[name] = peers.make(name, sizes, weights, shape.tokens)
            if name != DENSE:
                check(name, contenders[name], hidden_TH[checked], grad_TH[checked], wanted, shape.dtype)
        except Exception as error:
            failed(name, error)
    del wanted

    def clear() -> None:
        for contender in contenders.values():
            contender.clear()

    works = {name: partial(_step, contender.forward, hidden_TH, grad_TH) for name, contender in contenders.items()}
    timings = timed(works, 2 if tiny else 7, clear, failed)
    yield from ({"what": name, **about, "not_run": reason} for name, reason in reasons.items())
    yield from _rows(shape, about, timings, matmul(shape.dtype, tiny)["tflops"])


def _rows(shape: Shape, about: Row, timings: dict[str, Timing], ceiling_tflops: float) -> Iterator[Row]:
    """TFLOP/s of what a token passes through, whatever a peer computes besides."""
    flops = FLOPS_PER_WEIGHT * MATRICES * TOP_K * shape.tokens * shape.hidden * shape.inner
    best = {name: timing.best(clock()) for name, timing in timings.items()}
    for name, timing in timings.items():
        tflops = flops / best[name] / 1e12
        figures = {
            "tflops": tflops,
            "of_matmul": tflops / ceiling_tflops,
            "beside_dense": best[name] / best[DENSE],
            "h3scale_is_faster": best[name] / best[OURS],
        }
        yield {"what": name, **about, **figures, **timing.figures()}


def _step(forward: Callable[[Tensor], Tensor], hidden_TH: Tensor, grad_TH: Tensor) -> None:
    forward(hidden_TH.detach().requires_grad_()).backward(grad_TH)


def check(
    name: str, contender: Contender, hidden_TH: Tensor, grad_TH: Tensor, wanted: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """AssertionError when the output or a gradient, of the input or of any weight, is not that of float64."""
    hidden_TH = hidden_TH.detach().requires_grad_()
    output = contender.forward(hidden_TH)
    output.backward(grad_TH)
    found = {"output": output.detach(), "hidden": hidden_TH.grad, **contender.gradients()}
    for part, value in found.items():
        error = torch.linalg.norm(value.double() - wanted[part]) / torch.linalg.norm(wanted[part])
        if not error <= (ROUTER_TOLERANCE if part == "router" else TOLERANCE)[dtype]:
            raise AssertionError(f"{name}: {part} is off by {error:.2g}")


def timed(
    works: dict[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], Any] = lambda: None,
    failed: Callable[[str, Exception], Any] | None = None,
    *,
    gpu_rounds: int = 20,
    warm: int | None = None,
) -> dict[str, Timing]:
    """`warm` rounds that do not count, then `rounds`. On a GPU other numbers, and a work has ended when the GPU has."""
    on_gpu = device() == "cuda"
    ended = {name: partial(_to_the_end, work) for name, work in works.items()}
    going = interleaved(ended, (3 if on_gpu else 1) if warm is None else warm, before, failed)
    return interleaved({name: ended[name] for name in going}, gpu_rounds if on_gpu else rounds, before, failed)


def _to_the_end(work: Callable[[], Any]) -> None:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> str:
    return "wall_s" if torch.cuda.is_available() else "cpu_s"


def _word(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
