"""Merging on a GPU gives what the CPU gives, but for the rounding of sums in another order.

python -m pytest -m gpu tests/gpu/test_merge_gpu.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h3scale.config.merge import OPTIONS
from h3scale.fusion.merge import How
from h3scale.fusion.merged import Merger
from h3scale.fusion.parents import Parents
from h3scale.fusion.sources import open_sources
from h3scale.merge.delta import LowRank, dense
from h3scale.merge.registry import METHODS, merged_delta
from tests.tiny import tiny_aligned, tiny_llama
from tests.unit.fusion.merging import LABELS, adapter, models_for, run
from tests.unit.merge.test_methods import case, far, num_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

DEVICE = "cuda"
TOLERANCE = 1e-5  # relative Frobenius distance of the merged deltas
FLIPPED = 1e-3  # share of the entries for which TIES may choose otherwise, where products of factors are rounded in another order
WHOLE = ("linear", "ties", "dare", "tsv_m", "resm", "wudi")


@pytest.mark.parametrize("method", OPTIONS)
def test_a_gpu_merges_as_the_cpu(method: str) -> None:
    base, deltas = case((96, 160), num_models(method))
    options = OPTIONS[method]()
    wanted = dense(merged_delta(method, base, deltas, options))
    found = dense(merged_delta(method, base.cuda(), [delta.cuda() for delta in deltas], options))
    assert found.is_cuda
    assert far(found.cpu(), wanted) < TOLERANCE


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.on_matrices])
def test_a_gpu_merges_factors_as_the_cpu(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [LowRank(torch.randn(96, 4, generator=generator), torch.randn(4, 160, generator=generator)) for _ in range(3)]
    on_gpu = [LowRank(factor.left_OR.cuda(), factor.right_RI.cuda()) for factor in factors]
    base, options = torch.zeros(96, 160), OPTIONS[method]()
    wanted = dense(merged_delta(method, base, factors, options))
    assert far(dense(merged_delta(method, base.cuda(), on_gpu, options)).cpu(), wanted) < TOLERANCE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, models and adapters of it, in bf16."""
    place = tmp_path_factory.mktemp("place")
    base = tiny_llama(place / "base", dtype=torch.bfloat16)
    for seed, label in enumerate(LABELS):
        tiny_aligned(place / label, base, seed, ffn_only=False)
        adapter(place / f"lora-{label}", base, seed)
    return place


def changes(place: Path, merged: Path) -> dict[str, torch.Tensor]:
    """Of every tensor."""
    base = load_file(place / "base" / "model.safetensors")
    return {name: values - base[name].float() for name, values in load_file(merged / "model.safetensors").items()}


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], flipped: float = 0.0) -> None:
    """Tensor by tensor; but for a share of the entries, of which at least one may be another."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        apart = (found[name] - wanted[name]).abs().flatten()
        allowed = max(1, int(flipped * apart.numel())) if flipped else 0
        left = apart.sort().values[: apart.numel() - allowed]
        assert float(left.norm()) <= TOLERANCE * float(wanted[name].norm()), name


@pytest.mark.parametrize("prefix", ["", "lora-"])
@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_merge_on_a_gpu_by_several_threads_is_that_of_the_cpu(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, prefix: str
) -> None:
    for module in ("parents", "merged"):
        monkeypatch.setattr(f"h3scale.fusion.{module}.BLOCK_VALUES", 300)
    models = models_for(method, prefix)
    wanted = run(place, tmp_path / "cpu", method, models, How(workers=2, fsync=False), dtype="float32")
    found = run(place, tmp_path / "gpu", method, models, How(device=DEVICE, workers=4, fsync=False), dtype="float32")
    agree(changes(place, found), changes(place, wanted), FLIPPED if prefix and method == "ties" else 0.0)


def test_threads_of_a_new_process_can_be_the_first_to_decompose(place: Path, tmp_path: Path) -> None:
    models = [str(place / label) for label in LABELS]
    command = [sys.executable, "-m", "h3scale.cli.main", "merge", *models, "--base", str(place / "base"), "--method", "tsv_m"]
    command += ["--out", str(tmp_path / "gpu"), "--device", DEVICE, "--workers", "4", "dtype=float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = run(place, tmp_path / "cpu", "tsv_m", list(LABELS), How(workers=1, fsync=False), dtype="float32")
    agree(changes(place, tmp_path / "gpu"), changes(place, wanted))


@pytest.mark.parametrize("method", ["linear", "ties", "tsv_m"])
def test_rows_are_given_on_the_cpu(place: Path, method: str) -> None:
    base, models = open_sources(str(place / "base"), {label: str(place / label) for label in LABELS})
    merger = Merger(Parents(base, models, torch.device(DEVICE)), method, OPTIONS[method](), tuple(base.specs))
    merger.prepare()
    for name in base.specs:
        assert not merger.rows_of(name, 0, 1).is_cuda
        with merger.made(name) as rows:
            assert not rows(0, 1).is_cuda
