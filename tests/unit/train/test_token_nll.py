"""Cross entropy in chunks: torch's own values and gradients, whatever the size of the chunks."""

import pytest
import torch
import torch.nn.functional as F

from h3scale.train import token_nll as module
from h3scale.train.token_nll import token_nll

IGNORE = -100


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * 11)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 11, generator=generator)).to(dtype)
    targets = torch.tensor([0, 10, IGNORE, 3, 3, IGNORE, 9])
    weights = torch.rand(7, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = token_nll(ours, targets, IGNORE)
    expected = F.cross_entropy(theirs.float(), targets, ignore_index=IGNORE, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_row_without_targets_costs_nothing_and_moves_nothing() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    found = token_nll(logits, torch.full((3,), IGNORE), IGNORE)
    found.sum().backward()
    assert not found.any()
    assert logits.grad is not None
    assert not logits.grad.any()
