"""Room that the optimizer's moments will take, taken before they are there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MOMENTS = 2  # of AdamW, as large as the fp32 master weights each


@contextmanager
def room_for_moments(engine: Any) -> Iterator[int]:
    """Within, as much memory is taken as AdamW's moments will need; gives the bytes.

    DeepSpeed makes them at the first step, so a dry run before it would find too much room. Nothing is written into the
    memory: on a CPU it is a promise of the system's, on a GPU it is taken.
    """
    ballast = [torch.empty_like(master) for master in masters(engine) for _ in range(MOMENTS)]
    yield sum(part.numel() * part.element_size() for part in ballast)


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 master weights, as the optimizer has them at any ZeRO stage."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
