"""MegaBlocks' real packages beside current torch, on a CPU under Triton's interpreter; on a GPU its kernels as they are.

make test-megablocks
"""

import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from h3scale.errors import ConfigError
from h3scale.model.expert_compute import Backend, choose
from tests.expert_case import CHOICES, Case

pytestmark = pytest.mark.megablocks

SIZES = {"experts": 3, "hidden": 128, "inner": 256}  # blocks of 128, and no two sizes alike
ROOT = Path(__file__).parents[2]
BOTH = ("megablocks", "megablocks_grouped")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton looks for it when its kernels are defined."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    yield
    patch.undo()


@pytest.mark.parametrize("kind", CHOICES)
def test_block_sparse_experts_give_what_float64_gives(kind: str) -> None:
    Case(CHOICES[kind], **SIZES, dtype=torch.float32).check(choose("megablocks"), stacked=kind == "skewed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CHOICES)
def test_grouped_experts_give_what_float64_gives(kind: str, dtype: torch.dtype) -> None:
    Case(CHOICES[kind], **SIZES, dtype=dtype).check(choose("megablocks_grouped"), stacked=kind == "skewed")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 5),
    tokens=st.integers(1, 40),
    choices=st.integers(1, 5),
    taken=st.integers(1, 5),  # of the experts, by any token
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    name=st.sampled_from(BOTH),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    stacked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_routing_and_any_blocks_give_what_float64_gives(
    experts: int,
    tokens: int,
    choices: int,
    taken: int,
    blocks: tuple[int, int],
    name: str,
    dtype: torch.dtype,
    stacked: bool,
    seed: int,
) -> None:
    draw = random.Random(seed)
    some = draw.sample(range(experts), min(taken, experts))
    chosen = [draw.sample(some, min(choices, len(some))) for _ in range(tokens)]
    if name == "megablocks":  # the interpreter has no products of bf16
        dtype = torch.float32
    Case(chosen, experts, 128 * blocks[0], 128 * blocks[1], dtype, seed=seed).check_rounding(choose(name), stacked)


def in_autoep(backend: Backend, weights: list[torch.Tensor], rows: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    total = int(counts.sum())
    output = backend(rows, counts, *weights)
    gradients = torch.autograd.grad(output[:total].sin().sum(), [rows, *weights])
    return [output[:total].detach(), gradients[0][:total], *gradients[1:]]


@pytest.mark.parametrize("name", BOTH)
def test_rows_of_nobody_may_hold_anything_and_weights_may_be_taken_away_meanwhile(name: str) -> None:
    *weights, _ = Case([[0]], **SIZES, dtype=torch.float32).inputs()[2:]
    for weight in weights:
        weight.requires_grad_()
    rows = torch.randn(40, SIZES["hidden"])
    rows[32:] = torch.nan
    rows.requires_grad_()
    counts = torch.tensor([24, 0, 8], dtype=torch.int32)
    wanted = in_autoep(choose("loop"), weights, rows, counts)

    copies = [weight.detach().clone() for weight in weights]

    def taken(*arguments: torch.Tensor) -> torch.Tensor:
        output = choose(name)(*arguments)
        gathered = [StorageWeakRef(weight.data.untyped_storage()) for weight in weights]
        for weight in weights:
            weight.data = torch.empty(0)
        assert all(storage.expired() for storage in gathered)
        for weight, copy in zip(weights, copies, strict=True):
            weight.data = copy
        return output

    for found, want in zip(in_autoep(taken, weights, rows, counts), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_experts_that_are_computed_again_give_the_same_bits_and_keep_nothing_meanwhile(name: str) -> None:
    *weights, _ = Case([[0]], **SIZES, dtype=torch.float32).inputs()[2:]
    rows, counts = torch.randn(32, SIZES["hidden"]).requires_grad_(), torch.tensor([24, 0, 8], dtype=torch.int32)
    for weight in weights:
        weight.requires_grad_()
    wanted = in_autoep(choose(name), weights, rows, counts)
    made: list[StorageWeakRef] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.silu.default:
                made.append(StorageWeakRef(result.untyped_storage()))
            return result

    def computed(*arguments: torch.Tensor) -> torch.Tensor:
        with Noting():
            return choose(name)(*arguments)

    output = checkpoint(computed, rows, counts, *weights, use_reentrant=False)
    assert made
    assert all(activations.expired() for activations in made)
    output.sin().sum().backward()
    for leaf, want in zip([rows, *weights], wanted[1:], strict=True):
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("peer", ["SPARSE", "MEGA_GROUPED"])
def test_its_own_layer_gives_what_float64_gives_from_the_same_weights(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/moe_layer.py times it: router, sorting and sums are MegaBlocks' as well."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers, speed = importlib.import_module("moe_peers"), importlib.import_module("moe_speed")
    sizes = peers.Sizes(SIZES["experts"], SIZES["hidden"], SIZES["inner"], torch.float32, "cpu")
    weights, hidden = peers.Weights.draw(sizes), peers.tokens(sizes, 24, "zipf")
    grad = torch.randn_like(hidden)
    contender = peers.make(getattr(peers, peer), sizes, weights, 24)
    speed.check(peer, contender, hidden, grad, peers.reference(weights, hidden, grad), torch.float32)


def test_no_tokens_at_all_give_nothing() -> None:
    *weights, _ = Case([[0]], **SIZES, dtype=torch.float32).inputs()[2:]
    rows, counts = torch.randn(8, SIZES["hidden"]), torch.zeros(3, dtype=torch.int32)
    assert choose("megablocks")(rows, counts, *weights).shape == rows.shape


@pytest.mark.parametrize("sizes", [{"hidden": 64, "inner": 128}, {"hidden": 128, "inner": 192}])
def test_sizes_that_are_no_blocks_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"blocks of 128, .* {sizes['hidden']} and {sizes['inner']} \(works: megablocks_grouped"):
        Case([[0, 1]], experts=2, dtype=torch.float32, **sizes).found(choose("megablocks"), False)


def test_what_the_interpreter_computes_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bf16 needs a GPU"):
        Case([[0, 1]], **SIZES, dtype=torch.bfloat16).found(choose("megablocks"), False)


def test_without_gpu_and_interpreter_it_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" not in os.environ
    with pytest.raises(ConfigError, match=r"megablocks needs a GPU \(works: auto; TRITON_INTERPRET=1"):
        choose("megablocks")
