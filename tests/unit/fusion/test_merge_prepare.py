"""What is found out before the threads of a merge begin."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from h3scale.config.merge import OPTIONS
from h3scale.fusion import merged
from h3scale.fusion.merged import Merger
from h3scale.fusion.parents import Parents
from h3scale.fusion.sources import open_sources
from tests.unit.fusion.merging import LABELS


def merger(place: Path, method: str, device: str = "cpu", **values: Any) -> Merger:
    base, models = open_sources(str(place / "base"), {label: str(place / f"lora-{label}") for label in LABELS})
    return Merger(Parents(base, models, torch.device(device)), method, OPTIONS[method](**values), tuple(base.specs))


def test_thresholds_of_a_whole_model_are_looked_for_as_its_blocks_are_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    surveyed = Merger._surveyed

    def spying(self: Merger, names: Any) -> Any:
        seen.append(torch.get_num_threads())
        return surveyed(self, names)

    monkeypatch.setattr(merged.Merger, "_surveyed", spying)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merger(place, "ties", scope="model").prepare()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpus_decompositions_are_loaded_before_threads_can_ask_for_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    called: list[tuple[str, threading.Thread]] = []
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda n, dtype, device: called.append((device.type, threading.current_thread())) or eye(n))
    merger(place, "tsv_m", device).prepare()
    assert called == ([("cuda", threading.main_thread())] if device == "cuda" else [])
