"""Laws 3, 5 and 7 under real DeepSpeed: gloo ranks, ZeRO-3, expert parallelism."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import IGNORE, collate
from h3scale.data.encode import encode_records
from h3scale.data.loader import TypedLoader
from h3scale.data.sources import read_records
from h3scale.data.store import Tokens
from h3scale.launch.local import rank_command, run_ranks
from h3scale.model.experts import ExpertMap
from h3scale.model.router import membership_AE, router_loss_sum
from h3scale.model.start import load_model, load_tokenizer
from h3scale.model.trainable import freeze
from h3scale.train.loss import votes
from tests.distributed.dump_gradients import START_SHARE
from tests.tiny import WORDS, tiny_tokenizer

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "harmless", "honest", None)
CASES = [
    (1, 1, "both"),
    (2, 1, "response"),
    (2, 2, "prompt"),
    (2, 2, "both"),
    (4, 2, "both"),
    (4, 4, "both"),
]  # ranks, ep_size, vote


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
    alignments = tuple(name for name in experts if name)
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


def reference(world: Path, recipe: TrainRecipe) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients (AutoEP's names) and losses of the same global batch by plain transformers and autograd, in float64."""
    tokenizer = load_tokenizer(world / "moe")
    model = load_model(world / "moe").double()
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    freeze(model, recipe.trainable)
    encoded = encode_records(tokenizer, read_records(recipe.data.records))
    expert_map = ExpertMap.from_config(model.config)
    assert expert_map
    tokens = Tokens.of(encoded, expert_map.alignments)
    rows = TypedLoader(tokens, recipe.data, seed=recipe.seed).batch(0).rows
    batch = collate(rows, tokens, recipe.data.sequence_length, tokenizer.pad_token_id)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_router_logits=True)
    targets = batch.targets.flatten()
    lm = F.cross_entropy(output.logits.flatten(0, 1), targets, ignore_index=IGNORE)
    voting = votes(batch, recipe.router.vote)
    labels = batch.alignment_ids.flatten()
    member = membership_AE(expert_map)
    router = router_loss_sum(output.router_logits, labels, voting, member) / voting.sum()
    drift = torch.zeros((), dtype=torch.float64)
    gammas = [recipe.drift.gammas.get(a or "general", recipe.drift.gamma) for a in EXPERTS]
    layers = model.model.layers
    for layer in layers:
        for e, gamma in enumerate(gammas):
            weights = [layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.down_proj[e]]
            starts = [START_SHARE * w.detach() for w in weights]
            distance = sum((w - s).square().sum() for w, s in zip(weights, starts, strict=True))
            drift = drift + gamma / len(layers) * distance / sum(s.square().sum() for s in starts)
    (lm + recipe.router.loss_weight * router + drift).backward()
    gradients = {}
    for i, layer in enumerate(layers):
        gate, up = layer.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
        prefix = f"model.layers.{i}.mlp"
        gradients |= {f"{prefix}.experts.w1": gate, f"{prefix}.experts.w3": up}
        gradients |= {
            f"{prefix}.experts.w2": layer.mlp.experts.down_proj.grad,
            f"{prefix}.router.gate.weight": layer.mlp.gate.weight.grad,
        }
    return gradients, {"lm": lm.item(), "router": router.item(), "drift": drift.item()}


@pytest.mark.parametrize(("ranks", "ep_size", "vote"), CASES)
def test_losses_and_gradients_equal_single_process_autograd_on_every_topology(
    world: Path, tmp_path: Path, ranks: int, ep_size: int, vote: str
) -> None:
    overrides = [f"ep_size={ep_size}", f"router.vote={vote}"]
    recipe = load_recipe(TrainRecipe, world / "recipe.yaml", overrides)
    words = [str(world / "recipe.yaml"), str(tmp_path), *overrides]
    assert run_ranks(rank_command("tests.distributed.dump_gradients", words), ranks) == 0
    expected, losses = reference(world, recipe)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    for name, value in losses.items():
        assert line[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    parts = torch.load(tmp_path / "gradients.pt")
    for name, gradient in expected.items():
        found = torch.cat([part[name] for part in parts]) if ".experts." in name else parts[0][name]
        torch.testing.assert_close(found.double(), gradient, atol=1e-6, rtol=1e-5, msg=name)


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
