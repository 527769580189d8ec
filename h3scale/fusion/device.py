"""Where a merge is computed: a device that is there, and what is said when its memory is used up."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from h3scale.errors import ConfigError, UsageError


def check_device(device: str) -> None:
    """UsageError (2) for what is neither cpu nor a GPU that is here: other devices of torch have no values, or no fp64."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
    if device not in known:
        raise UsageError(f"--device: '{device}' is not here (works: {', '.join(known)})")
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:  # another process has it for itself, or its driver is too old
        raise UsageError(f"--device: '{device}': {str(error).strip().splitlines()[0]} (works: cpu)") from None


@contextmanager
def out_of_memory_told(device: str) -> Iterator[None]:
    """Within, a GPU whose memory is used up is a ConfigError (78): one line with what was asked for and what works."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device: {device}: {asked[:200]} (works: fewer --workers, or --device cpu)") from error
