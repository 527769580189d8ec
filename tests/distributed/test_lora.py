"""LoRA: only the updates move, and what a run leaves behind is one plain model with them merged in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from h3scale.checkpoint.verify import verify
from tests.distributed.test_train import EXPERTS, consolidated, make_world, run_train
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

LORA = ["trainable=[]", "optimizer.learning_rate=1e-2", "router.loss_weight=0", "drift.gamma=0", "drift.gammas={}"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    tiny_llama(folder / "dense")
    return folder


def settings(folder: Path, stage: int) -> str:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return f"deepspeed={folder / 'ds.json'}"


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_dense_model_tuned_by_low_rank_updates_is_the_same_from_every_stage(world: Path, tmp_path: Path) -> None:
    before = load_file(world / "dense" / "model.safetensors")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for stage in (0, 3):
        lora = "lora={rank: 2, alpha: 4, targets: [ffn, attention]}"
        run_train(world, tmp_path / f"{stage}", f"model={world / 'dense'}", settings(tmp_path, stage), lora, *LORA)
        whole = stage == 0
        found[stage] = load_file(tmp_path / "0" / "model.safetensors") if whole else consolidated(tmp_path / "3", tmp_path / "c")
    assert changed(before, found[3]) == {name for name in before if name.endswith("_proj.weight")}
    for name in changed(before, found[3]):
        delta = found[3][name] - before[name]
        assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2, name
        assert (found[3][name] - found[0][name]).abs().max() < 1e-5 * delta.abs().max() + 1e-7, name
    report = verify(tmp_path / "c", tmp_path / "3")
    assert not report.errors, report.errors  # the probe's logits among them
    AutoModelForCausalLM.from_pretrained(tmp_path / "c")


def test_a_fused_model_trains_its_experts_whole_and_its_attention_by_updates(world: Path, tmp_path: Path) -> None:
    before = load_file(world / "moe" / "model.safetensors")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for stage in (2, 3):
        words = [
            "lora={rank: 2, alpha: 4}",
            "ep_size=2",
            "drift.gamma=0",
            "drift.gammas={}",
            "optimizer.learning_rates={lora: 1e-2}",
        ]
        run_train(world, tmp_path / f"{stage}", settings(tmp_path, stage), *words)
        whole = stage == 2
        found[stage] = load_file(tmp_path / "2" / "model.safetensors") if whole else consolidated(tmp_path / "3", tmp_path / "c")
    moved = changed(before, found[3])
    assert moved == {name for name in before if "self_attn" in name or "block_sparse_moe" in name}
    assert max((found[2][name] - found[3][name]).abs().max() for name in moved) < 1e-6
    assert not verify(tmp_path / "c", tmp_path / "3").errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora={targets: [ffn]}"], "lora.targets: 'ffn': the model has no such matrices, experts are stacked (works: attention)"),
        (["lora={}", "trainable=[attention]"], "trainable: attention and lora exclude each other"),
        (["trainable=[]"], "`trainable` is required (such as [experts, router]), or `lora`"),
    ],
)
def test_what_cannot_be_is_said(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    arguments: Any = [str(world / "recipe.yaml"), f"out={tmp_path / 'out'}", *words]
    from h3scale.launch.local import rank_command, run_ranks

    assert run_ranks(rank_command("h3scale.train", arguments), 1) == 78
    assert said in capfd.readouterr().err
