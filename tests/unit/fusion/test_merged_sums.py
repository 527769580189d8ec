"""Sums of 16-bit parents, which are made without the parents' changes: against fp64, and beside the way that makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.merge import load_merge
from h3scale.errors import DataError
from h3scale.fusion.merge import How, merge
from h3scale.fusion.merged import Merger
from h3scale.fusion.parents import stays_finite
from tests.tiny import tiny_aligned, tiny_llama

LABELS = ("helpful", "harmless", "honest")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def parents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    base = tiny_llama(folder / "base", dtype=request.param)
    for seed, label in enumerate(LABELS):
        tiny_aligned(folder / label, base, seed, ffn_only=False, amount=0.01)
    return folder


def merged(parents: Path, out: Path, method: str, *overrides: str) -> ModelFolder:
    values = {"base": str(parents / "base"), "models": [str(parents / label) for label in LABELS], "dtype": "float32"}
    merge(*load_merge(None, values | {"method": method, "out": str(out)}, list(overrides)), how=How(fsync=False))
    return ModelFolder(out)


@pytest.fixture(autouse=True)
def _blocks_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("h3scale.fusion.merged._SUM_VALUES", 300)


def weights(folder: Path) -> dict[str, Tensor]:
    found = ModelFolder(folder)
    return {name: found.tensor(name).double() for name in found.specs}


@pytest.mark.parametrize(
    ("method", "numbers", "overrides"),
    [
        ("linear", (1 / 3, 1 / 3, 1 / 3), ()),
        ("linear", (0.2, 0.2, 0.6), ("weights=[1,1,3]",)),
        ("linear", (0.25, 0.25, 0.25), ("scaling=0.75",)),
        ("task_arithmetic", (1, 1, 1), ()),
        ("task_arithmetic", (0.5, -0.25, 0), ("weights=[1,-0.5,0]", "scaling=0.5")),
        ("task_arithmetic", (1, -1, 0), ("weights=[1,-1,0]",)),
    ],
)
def test_the_sum_is_that_of_fp64_to_the_rounding_of_fp32(
    parents: Path, tmp_path: Path, method: str, numbers: tuple[float, ...], overrides: tuple[str, ...]
) -> None:
    found, base = merged(parents, tmp_path / "out", method, *overrides), weights(parents / "base")
    models = [weights(parents / label) for label in LABELS]
    for name in found.specs:
        expected = base[name] + sum(n * (model[name] - base[name]) for n, model in zip(numbers, models, strict=True))
        torch.testing.assert_close(found.tensor(name).double(), expected, rtol=1e-6, atol=1e-7)


def test_the_changes_are_not_made(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a change was made")

    monkeypatch.setattr(Merger, "_rows", refuse)
    merged(parents, tmp_path / "out", "linear")
    with pytest.raises(AssertionError, match="a change was made"):
        merged(parents, tmp_path / "ties", "ties")


def test_values_that_rounding_makes_infinite_are_not_called_finite() -> None:
    largest = torch.finfo(torch.float32).max
    beyond = torch.tensor([largest, -largest, 1.0])  # each is finite and so is their sum, but not in 16 bits
    assert beyond.isfinite().all()
    assert not beyond.to(torch.bfloat16).isfinite().all()
    assert not stays_finite(beyond, torch.bfloat16)
    assert not stays_finite(torch.tensor([70_000.0]), torch.float16)
    assert not stays_finite(torch.tensor([1.0, float("nan")]), torch.float32)
    assert stays_finite(torch.tensor([60_000.0]), torch.float16)


def test_a_value_that_is_not_finite_is_blamed_on_its_parent(parents: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(parents / "honest", dtype="auto")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    values = {"models": [str(parents / "helpful"), str(tmp_path / "broken")], "method": "linear", "out": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"broken: model\.layers\.1\.mlp\.down_proj\.weight has values that are not finite"):
        merge(*load_merge(None, values, []), how=How(fsync=False))
    assert not (tmp_path / "out").exists()
