"""What an engine starts from: the folder's values, bit for bit, on every topology, without a rank that has them all."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from h3scale.checkpoint.expected import stored_as
from h3scale.launch.local import rank_command, run_ranks
from tests.distributed.dump_start import LENGTH
from tests.distributed.test_train import EXPERTS, make_world
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model in two shards, a dense one with tied and one with own output embeddings, and a recipe."""
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    AutoModelForCausalLM.from_pretrained(folder / "moe").save_pretrained(folder / "moe", max_shard_size="20KB")
    (folder / "moe" / "model.safetensors").unlink()
    tiny_llama(folder / "dense")
    tiny_llama(folder / "tied", tie_word_embeddings=True)
    return folder


def start(world: Path, out: Path, ranks: int, settings: dict[str, Any], *overrides: str) -> dict[str, Any]:
    ds_config = {"zero_optimization": {"stage": 3}, **settings}
    (out / "ds.json").write_text(json.dumps(ds_config))
    words = [str(world / "recipe.yaml"), str(out), f"deepspeed={out / 'ds.json'}", *overrides]
    assert run_ranks(rank_command("tests.distributed.dump_start", words), ranks) == 0
    return torch.load(out / "start.pt", weights_only=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def masters_in_hub_layout(started: dict[str, Any], names: list[str], moe_type: str) -> dict[str, torch.Tensor]:
    """The ranks' parts put together by their own account of where they lie."""
    whole: dict[str, dict[int, torch.Tensor]] = {}
    for masters in started["masters"]:
        for shard, values in masters:
            name = shard.name
            if len(shard.shape) < 3:
                flat = whole.setdefault(name, {}).setdefault(0, torch.full((prod(shard.shape),), torch.nan))
                flat[shard.begin : shard.stop] = values.float()
                continue
            done = 0
            for expert, low, high in shard.experts():
                flat = whole.setdefault(name, {}).setdefault(expert, torch.full((prod(shard.shape[1:]),), torch.nan))
                flat[low:high] = values[done : done + high - low].float()
                done += high - low
    origins = {name: stored_as(name, moe_type) for name in names}
    return {name: whole[stored][expert or 0] for name, (stored, expert) in origins.items()}


CASES = [
    ("moe", 1, 1, {}),
    ("moe", 2, 2, {}),
    ("moe", 4, 2, {}),
    ("moe", 2, 1, BF16),
    ("dense", 2, 1, {}),
    ("tied", 3, 1, BF16),
    ("moe", 4, 2, BF16 | ZERO2),
    ("dense", 2, 1, ZERO2),
]  # model, ranks, ep_size, DeepSpeed's settings


@pytest.mark.parametrize(("model", "ranks", "ep_size", "settings"), CASES)
def test_every_rank_starts_with_its_part_of_the_files_values(
    world: Path, tmp_path: Path, model: str, ranks: int, ep_size: int, settings: dict[str, Any]
) -> None:
    trained = ["trainable=[experts, router]"] if model == "moe" else ["trainable=[ffn, norms]"]
    rows = [f"data.rows_per_batch={8 * ranks}"]
    started = start(world, tmp_path, ranks, settings, f"model={world / model}", f"ep_size={ep_size}", *trained, *rows)
    stored = weights(world / model)
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    expected = AutoModelForCausalLM.from_pretrained(world / model, dtype=dtype)
    found = masters_in_hub_layout(started, list(stored), expected.config.model_type)
    for name, values in stored.items():
        trainable = ".mlp." in name or "block_sparse_moe" in name or ("norm" in name and model != "moe")
        exact = values if trainable else values.to(dtype).float()  # master weights are not rounded to bf16 first
        assert torch.equal(found[name].view(values.shape), exact), name
    with torch.no_grad():
        logits = expected(input_ids=torch.arange(LENGTH)[None], use_cache=False).logits
    tolerance = 0.05 * logits.std().item() if "bf16" in settings else 1e-5
    assert (started["logits"].float() - logits.float()).abs().max() < tolerance
    assert len(set(map(tuple, started["draws"]))) == ranks, "dropout draws the same numbers on all ranks"
    reserved, numel = started["room"]
    trained = [values.numel() for name, values in stored.items() if ".mlp." in name or "block_sparse" in name]
    assert reserved == 2 * 4 * numel, "AdamW has two moments in fp32"
    assert numel >= sum(trained) // ranks > 0
    rotary = dict(expected.named_buffers())
    for name, buffer in started["buffers"].items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, rotary[name]), "the rotary frequencies were rounded"


def broken(world: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    for file in (world / "dense").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reshape(values: dict[str, torch.Tensor]) -> None:
    values["model.norm.weight"] = torch.ones(7)


def test_a_folder_that_is_not_the_models_is_refused_with_every_finding(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "missing": (lambda values: values.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight (48, 32) is missing"),
        "more": (lambda values: values.update(spare=torch.ones(2)), "spare (2,) is in no such model"),
        "shape": (reshape, "model.norm.weight is (7,), config.json asks for (32,)"),
        "dtype": (lambda values: values.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "no floating point"),
    }
    recipe = yaml.safe_load((world / "recipe.yaml").read_text()) | {"trainable": ["ffn"]}
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(recipe))
    for name, (change, said) in cases.items():
        folder = broken(world, tmp_path / name, change)
        words = [str(tmp_path / "dense.yaml"), f"model={folder}", f"out={tmp_path / 'out'}"]
        assert run_ranks(rank_command("h3scale.train", words), 1) == 65
        shown = capfd.readouterr().err
        assert f"error: {folder}: " in shown, shown
        assert said in shown, shown
        assert not (tmp_path / "out").exists()


REFUSED = [
    (
        BF16 | {"zero_optimization": {"stage": 0}},
        [],
        [
            "has ZeRO stage 0, and experts need sharding (works: 1, 2, 3)",
            "has ZeRO stage 0, and bf16 needs it for its fp32 masters (works: 1, 2, 3)",
        ],
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        [],
        ["has ZeRO stage 2, and experts with offload_optimizer need 3 (works: 3, or no offload)"],
    ),
    ({"zero_optimization": {"stage": 3}}, ["trainable=[router]"], ["the experts are frozen, and DeepSpeed cannot save that"]),
    ({"zero_optimization": {"stage": 3}}, ["trainable=[]", "lora={}"], ["the experts are frozen, and DeepSpeed cannot save that"]),
]


@pytest.mark.parametrize(("settings", "words", "said"), REFUSED)
def test_what_could_not_be_trained_or_saved_is_refused_at_the_start(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], words: list[str], said: list[str]
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = [str(world / "recipe.yaml"), f"out={tmp_path / 'out'}", f"deepspeed={tmp_path / 'ds.json'}", *words]
    assert run_ranks(rank_command("h3scale.train", words), 1) == 78
    shown = capfd.readouterr().err
    assert all(line in shown for line in said), shown
