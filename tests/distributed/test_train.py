"""Laws 3 and 5 under real DeepSpeed: gloo ranks, ZeRO-3, expert parallelism."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from h3scale.launch.local import rank_command, run_ranks
from h3scale.model.experts import ExpertMap
from tests.tiny import WORDS, tiny_tokenizer

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "harmless", "honest", None)


def write_records(path: Path, alignments: tuple[str, ...]) -> None:
    lines = []
    for i in range(60):
        a = i % len(alignments)
        alignment = alignments[a]
        word = [WORDS[(i * 7 + k * (1 + a)) % len(WORDS)] for k in range(9)]
        prompt, response = " ".join(word[: 3 + i % 4]), " ".join(word[4 : 6 + a % 3])
        lines.append(json.dumps({"id": f"r{i}", "alignment": alignment, "prompt": prompt, "response": response}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny fused model, records and a recipe."""
    return make_world(tmp_path_factory.mktemp("world"), EXPERTS)


def make_world(folder: Path, experts: tuple[str | None, ...]) -> Path:
    alignments = tuple(dict.fromkeys(name for name in experts if name))
    tokenizer = tiny_tokenizer(folder / "moe")
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=len(experts),
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        sliding_window=None,
        pad_token_id=0,
    )
    config.h3scale = ExpertMap(alignments, experts).to_config()
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "moe")
    write_records(folder / "records.jsonl", alignments)
    recipe = {
        "model": str(folder / "moe"),
        "out": str(folder / "out"),
        "data": {
            "records": [str(folder / "records.jsonl")],
            "sequence_length": 48,
            "rows_per_batch": 8,
            "hygiene": {"exact_duplicates": False, "near_duplicates": None},
        },
        "steps": 4,
        "rows_per_micro_batch": 1,
        "trainable": ["experts", "router"],
        "optimizer": {"learning_rate": 1e-3},
        "router": {"loss_weight": 0.5, "vote": "both"},
        "drift": {"gamma": 0.3, "gammas": {"helpful": 2.0, "general": 0.0}},
        "deepspeed": "ds_configs/cpu_debug.json",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run_train(world: Path, out: Path, *overrides: str, ranks: int = 2) -> list[dict]:
    words = [str(world / "recipe.yaml"), f"out={out}", *overrides]
    assert run_ranks(rank_command("h3scale.train", words), ranks) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def consolidated(out: Path, target: Path) -> dict[str, torch.Tensor]:
    from h3scale.checkpoint.consolidate import consolidate

    consolidate(out, target)
    return load_file(target / "model.safetensors")


def test_frozen_tensors_stay_bitwise_and_trained_ones_move(world: Path, tmp_path: Path) -> None:
    run_train(world, tmp_path / "run", "ep_size=2")
    before, after = load_file(world / "moe" / "model.safetensors"), consolidated(tmp_path / "run", tmp_path / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("block_sparse_moe" not in name), name


def test_a_router_only_phase_moves_the_router_alone_and_leaves_a_checkpoint(world: Path, tmp_path: Path) -> None:
    run_train(world, tmp_path / "run", "ep_size=2", "optimizer.learning_rates={experts: 0}", "optimizer.weight_decay=0.1")
    before, after = load_file(world / "moe" / "model.safetensors"), consolidated(tmp_path / "run", tmp_path / "model")
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == [
        name for name in before if ".gate." in name
    ]


@pytest.mark.parametrize("experts", [("kind", "true"), ("a", "b", "c", "d", "e", None)])
def test_two_and_five_alignments_train_and_the_released_weights_give_the_engines_logits(
    tmp_path: Path, experts: tuple[str | None, ...]
) -> None:
    from h3scale.checkpoint.verify import verify

    world = make_world(tmp_path, experts)
    lines = run_train(world, tmp_path / "run", "ep_size=2", "drift.gammas={}")
    assert [name for name in lines[-1] if name.startswith("router_accuracy/")] == [f"router_accuracy/{a}" for a in experts if a]
    consolidated(tmp_path / "run", tmp_path / "model")
    verify(tmp_path / "model", against=tmp_path / "run")
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(m.config.h3scale['experts'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "model")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(list(experts))


def test_what_the_recipe_names_computes_the_experts_on_every_rank(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path))
    words = [str(world / "recipe.yaml"), f"out={tmp_path / 'run'}", "ep_size=2", "steps=1", "experts=grouped_mm"]
    assert run_ranks(rank_command("tests.distributed.note_experts", words), 2) == 0
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [["grouped_mm"]] * 2


def test_a_large_gamma_pins_the_experts(world: Path, tmp_path: Path) -> None:
    free = run_train(world, tmp_path / "free", "ep_size=2", "drift.gammas={}", "drift.gamma=1e-12", "steps=20")
    pinned = run_train(world, tmp_path / "pinned", "ep_size=2", "drift.gammas={}", "drift.gamma=1e4", "steps=20")
    assert 0 < pinned[-1]["drift"] / 1e4 < 0.02 * free[-1]["drift"] / 1e-12


def test_three_experts_on_two_ranks_are_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    words = [str(world / "recipe.yaml"), f"out={tmp_path / 'x'}", "ep_size=3"]
    command = [sys.executable, "-m", "h3scale.cli.main", "train", *words, "ranks=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {words[0]}: ep_size: 3 must divide num_experts = 4 and world_size = 2 (works: 1, 2)"
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
