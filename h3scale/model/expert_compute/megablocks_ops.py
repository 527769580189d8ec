"""MegaBlocks' seven compiled operations in plain torch, with the names and arguments of its extension `megablocks_ops`.

The extension of MegaBlocks 0.10 does not build with CUDA 13 (CUB dropped an argument). Its operations are bookkeeping:
none takes a share of a layer's time that one could see. On a CPU they are what makes MegaBlocks testable.
"""

import torch
from torch import Tensor


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Values ascending and where they were; `end_bit`, how many bits of them count, is a hint that nothing here needs."""
    values, places = x.sort(stable=True)
    x_out.copy_(values)
    iota_out.copy_(places)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """How often each of 0 ... num_bins - 1 is in the last dimension, int32."""
    counts = torch.zeros(*x.shape[:-1], num_bins, dtype=torch.int32, device=x.device)
    return counts.scatter_add_(-1, x.long(), torch.ones_like(x, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def indices(padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """The columns of the blocks of each block row: those of the expert that the row's tokens go to."""
    first = torch.arange(block_rows, device=padded_bins.device) * block_size
    expert = torch.searchsorted(padded_bins.long(), first, right=True)
    columns = expert.unsqueeze(-1) * block_columns + torch.arange(block_columns, device=padded_bins.device)
    out.copy_(columns.flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Each value of a row as often as its bin is wide; `bins` are where they end."""
    out.copy_(x[:, _bin_of(bins, out.shape[1])])


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    out.zero_().index_add_(1, _bin_of(bins, grad.shape[1]), grad)


def _bin_of(bins: Tensor, num_outputs: int) -> Tensor:
    return torch.searchsorted(bins.long(), torch.arange(num_outputs, device=bins.device), right=True)
