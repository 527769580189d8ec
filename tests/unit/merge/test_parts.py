"""Selection, chance and spectra by themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.merge.chance import chances
from h3scale.merge.select import largest
from h3scale.merge.spectrum import orthogonal_together, top_triplets


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_a_threshold_is_the_one_that_sorting_gives(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    wanted = float(tensor.abs().sort(descending=True).values[count - 1])
    for held in (len(values), 0):  # by partition, and by counting bits
        assert largest(lambda: iter(tensor.split(7)), len(values), count, held) == wanted


def test_nothing_reaches_the_threshold_of_a_count_of_zero() -> None:
    assert largest(lambda: iter([torch.ones(3)]), 3, 0) == float("inf")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(1, 50))
def test_any_part_of_the_random_numbers_can_be_drawn_alone(start: int, count: int) -> None:
    whole = chances(200, 3, "w", "a")
    assert torch.equal(chances(count, 3, "w", "a", start), whole[start : start + count])


def test_random_numbers_are_uniform() -> None:
    drawn = chances(100_000, 0, "w", "a")
    counts = np.histogram(drawn.numpy(), bins=20, range=(0, 1))[0]
    assert counts.sum() == 100_000
    assert abs(counts - 5000).max() < 5 * 5000**0.5


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_singular_values_and_vectors_are_those_of_the_full_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = top_triplets(matrix, 10)
    torch.testing.assert_close(found.values_K, s[:10], rtol=1e-9, atol=0)
    torch.testing.assert_close(found.left_OK * found.values_K @ found.right_IK.T, u[:, :10] * s[:10] @ v[:10], rtol=0, atol=1e-9)


def test_long_singular_vectors_kept_in_fp32_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(60, 40, generator=generator) for _ in range(3)]
    wanted = orthogonal_together([top_triplets(matrix, 13) for matrix in matrices])
    monkeypatch.setattr("h3scale.merge.spectrum.LONG", 0)
    found = orthogonal_together([top_triplets(matrix, 13) for matrix in matrices])
    assert isinstance(wanted, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 1e-4
