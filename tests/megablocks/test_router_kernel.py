"""The router's terms by one Triton kernel, under Triton's interpreter, against torch's own operations.

make test-megablocks, whose environment has Triton; on a GPU tests/gpu/test_router_kernel_gpu.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.config.recipe import RouterLoss
from h3scale.train.router_terms import RouterTerms
from tests.router_case import MicroBatch, RouterCase, count_operations

pytestmark = pytest.mark.megablocks

ROOT = Path(__file__).parents[2]


def terms(case: RouterCase, plain: bool) -> tuple[RouterTerms, torch.Tensor]:
    from h3scale.train.router_kernel import fused_terms
    from h3scale.train.router_terms import plain_terms

    return case.terms(plain_terms if plain else fused_terms)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    num_tokens=st.integers(1, 70),  # up to three programs, the last of them not full
    num_layers=st.integers(1, 3),
    owners=st.lists(st.sampled_from([0, 1, 2, None]), max_size=5).map(lambda more: [*more, 1, 0, 2]),
    top_k=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weights=st.sampled_from([(0.1, 0.0, 0.0), (0.0, 0.0, 0.0), (0.3, 1e-2, 0.0), (0.3, 1e-2, 0.1)]),
    seed=st.integers(0, 99),
)
def test_the_kernel_gives_the_losses_gradients_and_counts_of_plain_torch(
    num_tokens: int, num_layers: int, owners: list[int | None], top_k: int, dtype: torch.dtype, weights: Any, seed: int
) -> None:
    recipe = RouterLoss(loss_weight=weights[0], z_weight=weights[1], balance_weight=weights[2])
    case = RouterCase(num_layers, num_tokens, owners, top_k, dtype, recipe, seed)
    (wanted, slope), (found, fused_slope) = terms(case, plain=True), terms(case, plain=False)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    # Both end in the logits' dtype: bf16 has 8 bits, and a value at the edge may be rounded to the other side.
    torch.testing.assert_close(fused_slope, slope, rtol=1e-4 if dtype is torch.float32 else 2**-8, atol=1e-6)
    assert found.sums.keys() == wanted.sums.keys()
    for name, value in wanted.sums.items():
        torch.testing.assert_close(found.sums[name], value.double(), rtol=1e-5, atol=1e-4)
    assert (found.first_choices_LE is None) == (wanted.first_choices_LE is None)
    if found.first_choices_LE is not None:
        assert torch.equal(found.first_choices_LE, wanted.first_choices_LE)


def test_extreme_logits_stay_finite_and_padding_may_hold_anything() -> None:
    case = RouterCase(2, 40, [0, 1, 2, None], 1, torch.float32, RouterLoss(loss_weight=1.0))
    case.logits_LTE[:, :, 0] = 300.0
    case.logits_LTE[:, :, 1] = -300.0
    case.logits_LTE[:, case.labels_T < 0] = 1e4
    (wanted, slope), (found, fused_slope) = terms(case, plain=True), terms(case, plain=False)
    assert torch.isfinite(fused_slope).all()
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(fused_slope, slope)


def test_without_gradients_the_sums_are_the_same() -> None:
    case = RouterCase(2, 40, [0, 1, 2, None], 2, torch.float32, RouterLoss())
    with_slope, _ = terms(case, plain=False)
    with torch.no_grad():
        without, _ = terms(case, plain=False)
    assert all(torch.equal(without.sums[name], value) for name, value in with_slope.sums.items())


def test_the_kernel_compiles_to_machine_code_of_gpus(tmp_path: Path) -> None:
    """The interpreter takes what the compiler would not."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.megablocks.compile_router_kernel"]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9


class Launched:
    """Stands where the kernel does, whose own work the interpreter does with many operations."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, _grid: object) -> Any:
        return self

    def __call__(self, *_args: object, **_options: object) -> None:
        self.count += 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    from h3scale.train import router_kernel

    kernel = Launched()
    monkeypatch.setattr(router_kernel, "_kernel", kernel)
    return kernel


def test_losses_and_statistics_are_eight_kernels_with_their_backward(launched: Launched) -> None:
    """From who votes to the gradient of each layer's logits."""
    from h3scale.train.router_kernel import fused_terms

    case = RouterCase(32, 64, [0, 1, 2], 1, torch.bfloat16, RouterLoss(loss_weight=0.1, z_weight=1e-3))
    operations = count_operations(case, fused_terms)
    assert launched.count == 1
    assert 0 < operations.total() + 1 <= 8, operations


@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_whole_micro_batch_has_these_eight_more_and_autograds_sum_of_gradients_in_each_layer(
    family: str, num_layers: int, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    from h3scale.train import router_kernel, router_terms

    monkeypatch.setattr(router_terms, "plain_terms", router_kernel.fused_terms)  # as on a GPU
    added = MicroBatch(family, num_layers, torch.bfloat16).added_operations()
    assert launched.count == 2
    assert 0 < added.total() + 1 <= 8 + num_layers, added
