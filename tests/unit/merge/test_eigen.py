"""Eigenvectors by LAPACK's steps, against torch.linalg.eigh."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from h3scale.merge.eigen import eigh


def symmetric(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 90), share=st.floats(0, 1), missing=st.integers(0, 5), seed=st.integers(0, 99))
def test_values_are_torchs_and_vectors_are_those_of_the_largest(size: int, share: float, missing: int, seed: int) -> None:
    matrix, count = symmetric(size, max(size - missing, 0), seed), round(share * size)
    values, vectors = eigh(matrix.clone(), count)
    scale = float(matrix.abs().amax()) + 1
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-12 * size * scale)
    assert vectors.shape == (size, count)
    torch.testing.assert_close(matrix @ vectors, vectors * values[size - count :], rtol=0, atol=1e-12 * size * scale)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12 * size)


def test_all_vectors_unless_a_number_is_given_and_no_more_than_there_are() -> None:
    for count in (None, 7, 8):
        assert eigh(symmetric(7, 7), count)[1].shape == (7, 7)


@pytest.mark.parametrize("matrix", [torch.zeros(40, 40), torch.eye(40), torch.diag(torch.arange(40.0)), torch.ones(40, 40)])
def test_equal_values_and_what_is_diagonal_already(matrix: torch.Tensor) -> None:
    values, vectors = eigh(matrix.double())
    torch.testing.assert_close(vectors * values @ vectors.T, matrix.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-13)


def test_values_that_are_not_finite_are_refused_as_torch_refuses_them() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(torch.full((4, 4), torch.nan, dtype=torch.float64))


def test_threads_side_by_side_give_the_bits_of_one() -> None:
    matrices = [symmetric(200, 200, seed) for seed in range(4)]
    wanted = [eigh(matrix.clone()) for matrix in matrices]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(i: int) -> None:
        found[i] = eigh(matrices[i].clone())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(matrices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (values, vectors) in enumerate(wanted):
        assert torch.equal(found[i][0], values)
        assert torch.equal(found[i][1], vectors)
    assert {each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"} == {1}
