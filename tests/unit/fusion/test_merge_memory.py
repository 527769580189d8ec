"""What a merge holds while it works: of adapters one tensor's factors."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from h3scale.fusion.parents import Parents
from h3scale.fusion.sources import AdapterSource, open_sources
from h3scale.merge.delta import LowRank
from tests.unit.fusion.merging import LABELS, TARGETS, models_for, run


def test_factors_are_held_while_their_tensor_is_worked_on_and_no_longer(place: Path) -> None:
    base, models = open_sources(str(place / "base"), {label: str(place / f"lora-{label}") for label in LABELS})
    parents = Parents(base, models, torch.device("cpu"))
    first, second, *_ = [name for name in base.specs if any(target in name for target in TARGETS)]

    def factors(name: str) -> list[LowRank]:
        found = [parents.delta(model, name) for model in range(len(LABELS))]
        return [delta for delta in found if isinstance(delta, LowRank)]

    held = [weakref.ref(delta.left_OR) for delta in factors(first)]
    gc.collect()
    assert [ref() is delta.left_OR for ref, delta in zip(held, factors(first), strict=True)] == [True] * len(LABELS)
    assert len(factors(second)) == len(LABELS)
    gc.collect()
    assert [ref() for ref in held] == [None] * len(LABELS)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_factors_are_read_once_for_all_blocks_of_a_tensor(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked: list[tuple[str, str]] = []
    factors = AdapterSource.factors

    def counted(self: AdapterSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((self.label, name))
        return factors(self, name)

    monkeypatch.setattr(AdapterSource, "factors", counted)
    run(place, tmp_path / "out", method, models_for(method, "lora-"))
    assert asked
    assert len(asked) == len(set(asked))
