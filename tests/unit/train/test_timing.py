"""The clock of a step, where DeepSpeed exchanges tokens, and the peaks of devices."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch

from h3scale.train.peak import Peak, known_peak
from h3scale.train.timing import ALL_TO_ALL, PHASES, StepClock, timed_all_to_all


def test_phases_add_up_over_micro_batches_and_begin_anew_with_each_step() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("forward"), clock.phase(ALL_TO_ALL):
            time.sleep(0.01)
    first, second = clock.close(), clock.close()
    assert first["forward"] >= first[ALL_TO_ALL] >= 0.02
    assert second == dict.fromkeys(PHASES, 0.0)


def test_gpu_events_are_read_once_at_the_end_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    waits: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(now)

        def elapsed_time(self, other: "Event") -> float:
            assert waits, "read before the device was done"
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        with clock.phase("forward"), clock.phase(ALL_TO_ALL):
            pass
        with clock.phase("backward"):
            pass
        assert clock.close() == {**dict.fromkeys(PHASES, 0.0), "forward": 3.0, ALL_TO_ALL: 1.0, "backward": 1.0}
    assert len(waits) == 3
    assert len(clock.spare) == 6


def test_autoep_calls_the_collective_by_the_name_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.module_inject import auto_ep_layer

    moved = "DeepSpeed's AutoEP no longer exchanges tokens by auto_ep_layer.dist.all_to_all_single: train/timing.py must follow it"
    assert callable(getattr(getattr(auto_ep_layer, "dist", None), "all_to_all_single", None)), moved
    called: list[object] = []

    def exchange(output: torch.Tensor, source: torch.Tensor, **_: object) -> None:
        called.append(output.copy_(source))

    collectives = SimpleNamespace(all_to_all_single=exchange, other="as it is")
    monkeypatch.setattr(auto_ep_layer, "dist", collectives)
    clock = StepClock(torch.device("cpu"))
    x = torch.ones(2, 3, requires_grad=True)
    with timed_all_to_all(clock):
        assert auto_ep_layer.dist.other == "as it is"
        auto_ep_layer._AllToAllV.apply(None, x, [2], [2]).sum().backward()
    assert auto_ep_layer.dist is collectives
    assert len(called) == 2, moved  # forward and backward
    assert [name for name, _, _ in clock.spans] == [ALL_TO_ALL] * 2, moved


def test_a_deepspeed_without_that_name_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from deepspeed.module_inject import auto_ep_layer

    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    monkeypatch.setattr(auto_ep_layer, "dist", SimpleNamespace())
    with timed_all_to_all(StepClock(torch.device("cpu"))):
        pass
    assert "all-to-all is not timed" in caplog.text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H20", None),
    ],
)
def test_devices_are_known_by_name_and_others_are_not_guessed(name: str, tflops: float | None) -> None:
    known = known_peak(name)
    assert (known and known / 1e12) == tflops


def test_a_peak_says_whose_number_it_is() -> None:
    assert str(Peak(989e12, "NVIDIA H100, bf16 dense")) == "989 TFLOP/s (NVIDIA H100, bf16 dense)"
    assert str(Peak(59e9, "CPU, measured")) == "59 GFLOP/s (CPU, measured)"
