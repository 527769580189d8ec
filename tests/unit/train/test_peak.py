"""What MFU is a share of: ranks of unlike devices agree, whichever of them is asked."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from h3scale.train import peak
from h3scale.train.peak import known_peak, peak_of

H100, A100, UNKNOWN = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"
MEASURED = 5e12


def told(monkeypatch: pytest.MonkeyPatch, names: list[str], rank: int) -> peak.Peak:
    """What a rank of devices with these names gets."""

    def gather(found: list[Any], own: Any) -> None:
        assert own == names[rank]
        found[:] = names

    monkeypatch.setattr(dist, "get_world_size", lambda: len(names))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: names[rank])
    monkeypatch.setattr(peak, "_measured", lambda *_: MEASURED)
    return peak_of(torch.device("cuda"), torch.bfloat16, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_measure_where_one_device_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    found = told(monkeypatch, [H100, UNKNOWN], rank)
    assert found.flops == MEASURED
    assert found.source.startswith(f"{H100}, {UNKNOWN}, measured: bfloat16 product of ")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_peak_of_unlike_devices_is_their_mean(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    peaks = [known_peak(name) for name in (H100, A100)]
    found = told(monkeypatch, [H100, A100], rank)
    assert found.flops == sum(flops for flops in peaks if flops) / 2
    assert found.source == f"{H100}, {A100}, bf16 dense"
    assert told(monkeypatch, [H100, H100], rank) == peak.Peak(known_peak(H100) or 0, f"{H100}, bf16 dense")


def test_what_is_measured_is_about_what_a_product_takes(one_rank: None) -> None:
    found = peak_of(torch.device("cpu"), torch.float32, None)
    assert found.flops > 0
    assert found.source == f"CPU, measured: float32 product of {peak.SIZES['cpu']} x {peak.SIZES['cpu']}"
    assert peak_of(torch.device("cpu"), torch.float32, 2.0) == peak.Peak(2e12, "tracking.peak_tflops")
