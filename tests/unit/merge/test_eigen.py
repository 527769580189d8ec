"""Eigenvectors by LAPACK's steps, against torch.linalg.eigh."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from h3scale.errors import ConfigError
from h3scale.merge.eigen import MOST, eigh


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


@pytest.mark.parametrize("size", [1, 4, 30, 100])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(size: int, value: float) -> None:
    for matrix in (torch.full((size, size), value, dtype=torch.float64), symmetric(size, size).fill_diagonal_(value)):
        with pytest.raises(torch.linalg.LinAlgError):
            eigh(matrix)


def test_what_is_above_the_diagonal_is_not_looked_at() -> None:
    matrix = symmetric(50, 50)
    wanted, below = eigh(matrix.clone()), matrix.tril()
    assert all(torch.equal(one, other) for one, other in zip(eigh(below), wanted, strict=True))


def test_a_matrix_whose_room_cannot_be_counted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 + 4 * MOST + MOST**2 < 2**31 <= 1 + 4 * (MOST + 1) + (MOST + 1) ** 2
    monkeypatch.setattr("h3scale.merge.eigen.MOST", 4)
    with pytest.raises(ConfigError, match="5 rows"):
        eigh(symmetric(5, 5))


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
