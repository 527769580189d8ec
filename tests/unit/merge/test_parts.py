"""Selection, chance and spectra by themselves."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3scale.config.merge import Resm
from h3scale.merge.chance import chances
from h3scale.merge.delta import LowRank, Unread, dense, magnitudes
from h3scale.merge.resm import traits_of
from h3scale.merge.select import largest
from h3scale.merge.spectrum import BLOCK, gram, joined, orthogonal_together, top_triplets
from tests.unit.merge.oracle import side_by_side, svd
from tests.unit.merge.test_methods import far


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
    assert 0 < float((dense(found) - dense(wanted)).norm() / dense(wanted).norm()) < 1e-4


@pytest.mark.parametrize("shape", [(2 * BLOCK + 7, 600), (600, 2 * BLOCK + 7), (5, 5)])
def test_a_gram_matrix_made_by_halves_is_the_whole_product(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    short = (matrix if shape[0] <= shape[1] else matrix.T).double()
    torch.testing.assert_close(gram(matrix), short @ short.T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (40, 40), (30, 200), (200, 30)])  # the last with long vectors in fp32
@pytest.mark.parametrize(("apart", "error"), [(1.0, 1e-6), (1e-2, 5e-6), (1e-3, 5e-5), (1e-4, 5e-4)])
def test_models_far_apart_and_models_almost_alike_are_as_the_full_svd_says(
    shape: tuple[int, int], apart: float, error: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    common, *own = (torch.randn(shape, generator=generator) for _ in range(4))
    deltas = [(common if apart < 1 else 0) + apart * each for each in own]
    ranks = [10, 9, 8]
    wanted = side_by_side([svd(delta.double(), rank) for delta, rank in zip(deltas, ranks, strict=True)])
    found = joined(deltas, ranks, [1.0] * 3)
    assert far(dense(found), wanted) < error
    assert isinstance(found, LowRank) == (apart == 1)  # fp32 factors only where that is exact enough


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (40, 40)])
@pytest.mark.parametrize("power", [-0.5, -1.0, -2.0])
def test_spectra_that_fall_fast_are_as_the_full_svd_says(shape: tuple[int, int], power: float) -> None:
    generator = torch.Generator().manual_seed(0)
    short = min(shape)
    sides = [[torch.linalg.qr(torch.randn(n, short, generator=generator))[0] for n in shape] for _ in range(3)]
    deltas = [left * (1 + torch.arange(short)) ** power @ right.T for left, right in sides]
    ranks = [short // 3] * 3
    wanted = side_by_side([svd(delta.double(), rank) for delta, rank in zip(deltas, ranks, strict=True)])
    assert far(dense(joined(deltas, ranks, [1.0] * 3)), wanted) < 1e-6


@pytest.mark.parametrize(("size", "as_factors"), [(0.05, True), (0.002, False)])
def test_what_is_left_of_factors_in_fp32_weights_is_theirs_only_while_rounding_is_below_what_gram_matrices_see(
    size: float, as_factors: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, ranks = 0.02 * torch.randn(60, 200, generator=generator), [20] * 3
    factors = [
        LowRank(size * torch.randn(60, 4, generator=generator), size * torch.randn(4, 200, generator=generator)) for _ in range(3)
    ]
    stored = [(weights + factor.dense()) - weights for factor in factors]
    found, wanted = dense(joined(stored, ranks, [1.0] * 3)), dense(joined(factors, ranks, [1.0] * 3))
    exact = side_by_side([svd(delta.double(), rank) for delta, rank in zip(stored, ranks, strict=True)])
    assert (far(found, wanted) < 1e-5) == as_factors
    assert (far(found, exact) < 1e-2) == (not as_factors)  # to SVDs of fp64 the rounding is as good a direction as any
    assert far(exact, wanted) > 0.2  # which is why docs/merge.md asks for adapters, not for models that they were merged into


@pytest.mark.parametrize("shape", [(30, 90), (90, 30)])
def test_a_matrix_that_is_read_in_parts_gives_the_same_bits_as_one_in_memory(shape: tuple[int, int]) -> None:
    deltas = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    buffer = torch.empty(shape)

    def unread(values: torch.Tensor) -> Unread:
        def read(rows: slice, columns: slice) -> torch.Tensor:
            buffer.fill_(torch.nan)  # what was read before is not there any more
            return buffer[rows, columns].copy_(values[rows, columns])

        return Unread(shape, values.device, read)

    found = joined([unread(delta) for delta in deltas], [10, 9, 8], [1.0] * 3)
    assert torch.equal(dense(found), dense(joined(deltas, [10, 9, 8], [1.0] * 3)))
    assert torch.equal(unread(deltas[0]).dense(), deltas[0])


@pytest.mark.parametrize("shape", [(7, 5), (300, 1100), (3000, 90)])
def test_each_magnitude_of_a_product_is_seen_once(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator))
    wanted = factors.dense().abs().reshape(-1).sort().values
    for delta in (factors, factors.dense()):
        found = torch.cat([block.clone() for block in magnitudes(delta)]).sort().values
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1100, 300), (300, 1100)])
def test_entries_of_a_product_are_counted_in_blocks_of_unlike_sizes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of an output that it has to make larger
        found = traits_of(factors, Resm())
    sizes = factors.dense().abs()
    assert found.num_dense == pytest.approx(
        int((sizes >= 0.01 * sizes.max()).sum()), abs=2
    )  # products of other sizes round otherwise
    assert found.outlier_share == pytest.approx(float(sizes[sizes > found.threshold].sum() / sizes.sum()), rel=1e-3)
