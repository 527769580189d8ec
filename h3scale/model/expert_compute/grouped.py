"""torch's grouped GEMM: one kernel for all experts, and no wait for the counts. Real on Hopper and later; elsewhere a loop.

Shape suffixes: R rows, E experts, K and N any two widths.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from h3scale.errors import ConfigError

ALIGNED_BYTES = 16  # of every row, or torch refuses
HOPPER = (9, 0)


class Grouped:
    """Kernels of model.expert_compute.swiglu. fp32 and bf16; widths are multiples of 16 bytes."""

    def groups(self, counts_E: Tensor) -> Tensor:
        return counts_E.cumsum(0, dtype=torch.int32)

    def product(self, rows_RK: Tensor, weight_EKN: Tensor, groups: Tensor) -> Tensor:
        return F.grouped_mm(rows_RK, weight_EKN, offs=groups)

    def outer(self, left_RN: Tensor, right_RK: Tensor, groups: Tensor) -> Tensor:
        return F.grouped_mm(left_RN.mT, right_RK, offs=groups)


def check_aligned(hidden: int, inner: int, dtype: torch.dtype) -> None:
    """ConfigError (78) for widths that torch does not take at all."""
    if not _is_aligned((hidden, inner), dtype):
        raise ConfigError(
            f"experts: grouped_mm needs widths in multiples of {ALIGNED_BYTES} bytes, and hidden and intermediate size are "
            f"{hidden} and {inner} (works: loop, auto)"
        )


def _is_aligned(widths: Sequence[int], dtype: torch.dtype) -> bool:
    return all(width * dtype.itemsize % ALIGNED_BYTES == 0 for width in widths)


def is_real(weight_ENK: Tensor) -> bool:
    """Whether torch has a kernel of its own for such weights here; it has a loop where not, or refuses."""
    if not weight_ENK.is_cuda or weight_ENK.dtype != torch.bfloat16:
        return False
    return _is_aligned(weight_ENK.shape[1:], weight_ENK.dtype) and torch.cuda.get_device_capability(weight_ENK.device) >= HOPPER
