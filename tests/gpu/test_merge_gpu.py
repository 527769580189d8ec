"""Merging on a GPU gives what the CPU gives, but for the rounding of sums in another order.

python -m pytest -m gpu tests/gpu/test_merge_gpu.py
"""

import pytest
import torch

from h3scale.config.merge import OPTIONS
from h3scale.merge.delta import LowRank, dense
from h3scale.merge.registry import METHODS, merged_delta
from tests.unit.merge.test_methods import case, far, num_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

TOLERANCE = 1e-5  # relative Frobenius distance of the merged deltas


@pytest.mark.parametrize("method", OPTIONS)
def test_a_gpu_merges_as_the_cpu(method: str) -> None:
    base, deltas = case((96, 160), num_models(method))
    options = OPTIONS[method]()
    wanted = dense(merged_delta(method, base, deltas, options))
    found = dense(merged_delta(method, base.cuda(), [delta.cuda() for delta in deltas], options))
    assert found.is_cuda
    assert far(found.cpu(), wanted) < TOLERANCE


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.on_matrices])
def test_a_gpu_merges_factors_as_the_cpu(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [LowRank(torch.randn(96, 4, generator=generator), torch.randn(4, 160, generator=generator)) for _ in range(3)]
    on_gpu = [LowRank(factor.left_OR.cuda(), factor.right_RI.cuda()) for factor in factors]
    base, options = torch.zeros(96, 160), OPTIONS[method]()
    wanted = dense(merged_delta(method, base, factors, options))
    assert far(dense(merged_delta(method, base.cuda(), on_gpu, options)).cpu(), wanted) < TOLERANCE
