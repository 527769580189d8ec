"""MegaBlocks' compiled operations in plain torch, against plain Python; the packages themselves are tested in tests/megablocks."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from h3scale.errors import ConfigError
from h3scale.model.expert_compute import choose, grouped_gemm
from h3scale.model.expert_compute import megablocks_ops as ops

WIDTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_sort_histogram_and_sums_are_those_of_python(values: list[int]) -> None:
    x, out, places = ints(values), ints(values), ints(values)
    ops.sort(x, 3, out, places)
    assert out.tolist() == sorted(values)
    assert places.tolist() == sorted(range(len(values)), key=values.__getitem__)
    assert ops.histogram(x, 9).tolist() == [values.count(i) for i in range(9)]
    assert ops.histogram(x, 9).dtype == torch.int32
    ops.inclusive_cumsum(x.view(1, -1), 1, out.view(1, -1))
    assert out.tolist() == list(accumulate(values))
    ops.exclusive_cumsum(x.view(1, -1), 1, out.view(1, -1))
    assert out.tolist() == list(accumulate(values, initial=0))[:-1]


@settings(max_examples=30, deadline=None)
@given(WIDTHS, st.integers(1, 3))
def test_indices_are_the_columns_of_the_expert_of_each_block_row(blocks: list[int], columns: int) -> None:
    """`blocks`: block rows of each expert."""
    size, rows = 4, sum(blocks)
    out = torch.empty(rows * columns, dtype=torch.int16)
    ops.indices(ints([size * end for end in accumulate(blocks)]), size, rows, columns, out)
    expected = [expert * columns + column for expert, count in enumerate(blocks) for _ in range(count) for column in range(columns)]
    assert out.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(WIDTHS)
def test_replicating_repeats_and_its_backward_adds_up(widths: list[int]) -> None:
    x = torch.arange(2.0 * len(widths)).view(2, -1)
    bins, repeats = ints(list(accumulate(widths))), torch.tensor(widths)
    out, back = torch.empty(2, sum(widths)), torch.empty_like(x)
    ops.replicate_forward(x, bins, out)
    assert torch.equal(out, x.repeat_interleave(repeats, dim=1))
    ops.replicate_backward(out, bins, back)
    assert torch.equal(back, x * repeats)


@pytest.mark.parametrize("trans_b", [False, True])
def test_gmm_is_a_product_an_expert_with_the_gradients_of_autograd(trans_b: bool) -> None:
    counts = torch.tensor([3, 0, 2])
    a = torch.randn(5, 4, requires_grad=True)
    b = torch.randn(*((3, 6, 4) if trans_b else (3, 4, 6)), requires_grad=True)
    matrices = b.mT if trans_b else b
    plain = torch.cat([rows @ matrix for rows, matrix in zip(a.split(counts.tolist()), matrices, strict=True)])
    found = grouped_gemm.ops.gmm(a, b, counts, trans_b=trans_b)
    torch.testing.assert_close(found, plain)
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), (a, b)) for out in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["megablocks", "megablocks_grouped"])
def test_without_the_packages_the_command_that_installs_them_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"megablocks, stk, triton not installed \(works: make megablocks; auto\)"):
        choose(name)
