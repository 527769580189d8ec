"""Where the time of a step goes. On CUDA by events, which are read when the step is over; nothing waits before."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from h3scale.log import logger

PHASES = ("data", "forward", "backward", "step")
ALL_TO_ALL = "all_to_all"  # within forward and backward


class StepClock:
    """Seconds of this rank's phases, added up until `close`.

    On CUDA they are of the device's own time line: data is how long the device stood still for it.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self.spare: list[Any] = []  # events are used again

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self.spans.append((name, start, self._mark()))

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Within, nothing is added to the phases."""
        before = len(self.spans)
        yield
        del self.spans[before:]

    def close(self) -> dict[str, float]:
        """Seconds by phase since the last call. On CUDA this waits for the device: call it when the step is over."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.spans:
            seconds[name] = seconds.get(name, 0.0) + (start.elapsed_time(end) / 1000 if self.on_gpu else end - start)
            if self.on_gpu:
                self.spare += (start, end)
        self.spans.clear()
        return seconds

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def timed_all_to_all(clock: StepClock) -> Iterator[None]:
    """Within, every exchange of tokens between expert-parallel ranks (DeepSpeed's AutoEP) is a phase of the clock.

    DeepSpeed has no timer there, so the name by which AutoEP calls the collective is replaced. With the DeepEP back end, which
    has other calls, nothing is timed.
    """
    from deepspeed.module_inject import auto_ep_layer

    collectives = getattr(auto_ep_layer, "dist", None)
    exchange = getattr(collectives, "all_to_all_single", None)
    if exchange is None:
        logger.warning("all-to-all is not timed: this DeepSpeed has no auto_ep_layer.dist.all_to_all_single")
        yield
        return
    auto_ep_layer.dist = _Timed(collectives, exchange, clock)
    try:
        yield
    finally:
        auto_ep_layer.dist = collectives


class _Timed:
    """A module of collectives whose all-to-all is timed."""

    def __init__(self, collectives: Any, exchange: Callable[..., Any], clock: StepClock):
        self._collectives = collectives

        @wraps(exchange)
        def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
            with clock.phase(ALL_TO_ALL):
                return exchange(*args, **kwargs)

        self.all_to_all_single = all_to_all_single

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collectives, name)
