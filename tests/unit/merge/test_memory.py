"""What methods on matrices hold, and what they say they do."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from h3scale.config.merge import OPTIONS
from h3scale.merge.delta import Unread
from h3scale.merge.registry import METHODS, merged_delta


def unread(values: torch.Tensor) -> Unread:
    """As a matrix that lies in files."""
    room = torch.empty(values.numel())

    def read(rows: slice, columns: slice) -> torch.Tensor:
        part = values[rows, columns]
        return room[: part.numel()].view(part.shape).copy_(part)

    return Unread(tuple(values.shape), values.device, read)


def most_bytes(work: Callable[[], Any]) -> int:
    """What torch holds at the most while it works, with what LAPACK is given to work in, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    ("shape", "large"), [((128, 448), True), ((448, 128), False), ((128, 128), False), ((1024, 64), False), ((64, 1024), False)]
)
@pytest.mark.parametrize(
    ("method", "values"),
    [("tsv_m", {}), ("resm", {}), ("resm", {"outliers": "element"}), ("iso_c", {}), ("iso_cts", {}), ("wudi", {})],
)
def test_a_matrix_takes_as_much_memory_as_is_said_and_no_more(
    monkeypatch: pytest.MonkeyPatch, method: str, values: dict[str, Any], shape: tuple[int, int], large: bool
) -> None:
    monkeypatch.setattr("h3scale.merge.spectrum.CHUNK", 16)
    monkeypatch.setattr("h3scale.merge.spectrum.LARGE", 0 if large else 1 << 60)
    monkeypatch.setattr("h3scale.merge.delta.BLOCK_VALUES", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    like, options = torch.empty(shape, device="meta"), OPTIONS[method](**values)
    for apart in (1.0, 1e-2):  # models that are almost alike have their last product whole
        common = (apart < 1) * torch.randn(shape, generator=generator)
        deltas = [unread(common + apart * torch.randn(shape, generator=generator)) for _ in range(3)]
        taken = most_bytes(lambda deltas=deltas: merged_delta(method, like, deltas, options))
        said = METHODS[method].num_bytes(shape, len(deltas))
        assert said / 2 < taken <= said


@pytest.mark.parametrize(
    ("method", "values", "shape", "num_models", "density"),
    [
        ("iso_cts", {"common_fraction": 1.0}, (128, 128), 3, 1.0),  # nothing is asked of the models alone
        ("iso_cts", {}, (128, 448), 8, 1.0),
        ("resm", {}, (32, 1024), 3, 0.31),  # ranks so few that what is merged is just smaller as factors
        ("resm", {"outliers": "element"}, (64, 1024), 2, 1.0),
    ],
)
@pytest.mark.parametrize("apart", [1.0, 1e-2])
def test_the_bound_holds_where_much_is_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    values: dict[str, Any],
    shape: tuple[int, int],
    num_models: int,
    density: float,
    apart: float,
) -> None:
    monkeypatch.setattr("h3scale.merge.spectrum.CHUNK", 16)
    monkeypatch.setattr("h3scale.merge.delta.BLOCK_VALUES", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    is_there = torch.rand(shape, generator=generator) < density
    common = (apart < 1) * torch.randn(shape, generator=generator)
    deltas = [unread(is_there * (common + apart * torch.randn(shape, generator=generator))) for _ in range(num_models)]
    like, options = torch.empty(shape, device="meta"), OPTIONS[method](**values)
    taken = most_bytes(lambda: merged_delta(method, like, deltas, options))
    assert taken <= METHODS[method].num_bytes(shape, num_models)
