"""The backends by name. Each computes the same; `auto` takes the fastest one that is right where it is asked."""

from collections.abc import Callable

import torch
from torch import Tensor

from h3scale.errors import ConfigError
from h3scale.model.expert_compute.grouped import Grouped, check_aligned, is_real
from h3scale.model.expert_compute.loop import loop
from h3scale.model.expert_compute.swiglu import swiglu

# (rows (R, H) sorted by expert, counts (E,), w1 (E, I, H), w2 (E, H, I), w3 (E, I, H)) -> (R, H). Without w3, w1 is gate above
# up, (E, 2I, H). Rows after the last expert's belong to nobody.
Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

GROUPED = Grouped()


def _auto(rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    if is_real(w1) and is_real(w2_EHI):
        return swiglu(GROUPED, rows_RH, counts_E, w1, w2_EHI, w3)
    return loop(rows_RH, counts_E, w1, w2_EHI, w3)


def _grouped(rows_RH: Tensor, counts_E: Tensor, w1: Tensor, w2_EHI: Tensor, w3: Tensor | None) -> Tensor:
    check_aligned(w2_EHI.shape[1], w2_EHI.shape[2], rows_RH.dtype)
    return swiglu(GROUPED, rows_RH, counts_E, w1, w2_EHI, w3)


def _megablocks(mode: str) -> Backend:
    from h3scale.model.expert_compute.megablocks import load

    return load(mode)


_BACKENDS: dict[str, Callable[[], Backend]] = {
    "auto": lambda: _auto,
    "loop": lambda: loop,
    "grouped_mm": lambda: _grouped,
    "megablocks": lambda: _megablocks("sparse"),
    "megablocks_grouped": lambda: _megablocks("grouped"),
}
NAMES = tuple(_BACKENDS)


def choose(name: str, where: str = "experts") -> Backend:
    """The backend of that name. ConfigError (78) for a name that is none, and for packages that are not installed."""
    if name not in _BACKENDS:
        raise ConfigError(f"{where}: {name} (works: {', '.join(NAMES)})")
    return _BACKENDS[name]()


def check_fits(name: str, hidden: int, inner: int, dtype: torch.dtype) -> None:
    """ConfigError (78) for sizes of experts, or a dtype, that the backend would refuse on this machine."""
    if name == "grouped_mm":
        check_aligned(hidden, inner, dtype)
    if name == "megablocks":
        from h3scale.model.expert_compute.megablocks import check_sparse

        check_sparse(hidden, inner, dtype, torch.cuda.is_available())
