"""A family of models, made once for all files here."""

from pathlib import Path

import pytest

from tests.tiny import tiny_aligned, tiny_llama
from tests.unit.fusion.merging import LABELS, adapter


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three aligned models, three adapters."""
    place = tmp_path_factory.mktemp("family")
    base = tiny_llama(place / "base")
    for i, label in enumerate(LABELS):
        tiny_aligned(place / label, base, seed=i + 1, ffn_only=False)
        adapter(place / f"lora-{label}", base, seed=i + 1)
    return place


@pytest.fixture
def place(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work goes in blocks of some rows, as in large models."""
    monkeypatch.setattr("h3scale.fusion.parents.BLOCK_VALUES", 300)
    monkeypatch.setattr("h3scale.fusion.merged.BLOCK_VALUES", 300)
    return family
