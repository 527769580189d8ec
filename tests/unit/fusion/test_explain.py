"""Where models collide: every figure against a plain fp64 formula, adapters by their factors, layers as sums of their tensors."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from h3scale.cli.main import app
from h3scale.config.merge import load_merge
from h3scale.errors import DataError
from h3scale.fusion.explain import DENSITY, DIRECTIONS, RESM, collision, explain, worst
from h3scale.fusion.merge import plan_merge
from tests.tiny import tiny_aligned, tiny_llama

MODELS = ("helpful", "harmless", "lora")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    base = tiny_llama(folder / "base")
    tiny_aligned(folder / "helpful", base, 1, ffn_only=False)
    tiny_aligned(folder / "harmless", base, 2, ffn_only=False)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder / "lora"))
    return folder


def explained(folder: Path, *models: str) -> dict[str, Any]:
    values = {"base": str(folder / "base"), "models": [str(folder / m) for m in models], "method": "ties", "out": "none"}
    return explain(plan_merge(*load_merge(None, values, [])))


@pytest.fixture(scope="module")
def found(parents: Path) -> dict[str, Any]:
    return explained(parents, *MODELS)


def plain_deltas(parents: Path, name: str) -> list[Tensor]:
    def weights(folder: Path) -> Tensor:
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()[name].double()

    base = weights(parents / "base")
    lora = AutoModelForCausalLM.from_pretrained(parents / "base")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(lora, str(parents / "lora")).merge_and_unload().state_dict()[name].double()
    return [weights(parents / "helpful") - base, weights(parents / "harmless") - base, merged - base]


def plain_pair(a: Tensor, b: Tensor) -> dict[str, float]:
    """As the docstring of the module says it, with a full sort and full SVDs."""

    def large(delta: Tensor) -> Tensor:
        least = delta.abs().flatten().sort(descending=True).values[int(DENSITY * delta.numel()) - 1]
        return delta.abs() >= least

    both = large(a) & large(b)
    opposed = both & (a.sign() != b.sign())
    k = min(DIRECTIONS, max(1, min(a.shape) // 8))
    (ua, _, va), (ub, _, vb) = torch.linalg.svd(a), torch.linalg.svd(b)
    left = (ua[:, :k].T @ ub[:, :k]).square().sum() / k
    right = (va[:k] @ vb[:k].T).square().sum() / k
    return {
        "cosine": float((a * b).sum() / a.norm() / b.norm()),
        "sign_conflict": float(opposed.sum() / both.sum()),
        "entries_of_both": int(both.sum()),
        "overlap": float((left + right) / 2),
        "overlap_by_chance": k * (1 / a.shape[0] + 1 / a.shape[1]) / 2,
    }


def test_every_figure_of_a_matrix_is_that_of_the_plain_formula(parents: Path, found: dict[str, Any]) -> None:
    tensor = next(each for each in found["tensors"] if each["name"] == DOWN)
    deltas = plain_deltas(parents, DOWN)
    for pair, (i, j) in zip(tensor["pairs"], combinations(range(3), 2), strict=True):
        assert pair.pop("models") == [MODELS[i], MODELS[j]]
        assert pair == pytest.approx(plain_pair(deltas[i], deltas[j]), rel=1e-4)
    for label, delta in zip(MODELS, deltas, strict=True):
        sizes = delta.abs()
        least = sizes.mean() + RESM.outlier_kappa * sizes.std(correction=0)
        assert tensor["models"][label] == pytest.approx(
            {
                "norm": float(delta.norm()),
                "outlier_share": float(sizes[sizes > least].sum() / sizes.sum()),
                "sparsity": float((sizes < RESM.sparsity_threshold * sizes.max()).double().mean()),
            },
            rel=1e-4,
        )


def test_a_layer_is_the_sum_of_its_tensors(parents: Path, found: dict[str, Any]) -> None:
    layer = next(each for each in found["layers"] if each["layer"] == "1")
    tensors = [each for each in found["tensors"] if each["layer"] == "1"]
    one, other = (torch.cat([plain_deltas(parents, each["name"])[i].flatten() for each in tensors]) for i in (0, 1))
    pair = layer["pairs"][0]
    assert pair["cosine"] == pytest.approx(float(one @ other / one.norm() / other.norm()), rel=1e-4)
    assert pair["entries_of_both"] == sum(each["pairs"][0]["entries_of_both"] for each in tensors)
    assert {each["layer"] for each in found["layers"]} == {"embeddings", "0", "1", "other"}


def test_what_an_adapter_leaves_alone_has_no_cosine_and_no_conflict(found: dict[str, Any]) -> None:
    norm = next(each for each in found["tensors"] if each["name"] == "model.norm.weight")
    with_adapter = [pair for pair in norm["pairs"] if "lora" in pair["models"]]
    assert all(pair["cosine"] is None and pair["sign_conflict"] is None and pair["overlap"] is None for pair in with_adapter)


def test_a_planted_collision_is_named(parents: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(parents / "base").state_dict()
    against = AutoModelForCausalLM.from_pretrained(parents / "helpful")
    with torch.no_grad():
        for name, values in against.named_parameters():
            if name == DOWN:
                values.copy_(2 * base[name] - values)  # the opposite change
    against.save_pretrained(tmp_path / "against")
    values = {"base": str(parents / "base"), "models": [str(parents / "helpful"), str(tmp_path / "against")]}
    values |= {"method": "ties", "out": "none"}
    explained = explain(plan_merge(*load_merge(None, values, [])))
    worst_tensor = explained["collide_most"]["tensor"]
    assert (worst_tensor["name"], worst_tensor["sign_conflict"]) == (DOWN, 1.0)
    assert worst_tensor["cosine"] == pytest.approx(-1)
    assert worst_tensor["overlap"] == pytest.approx(1)
    assert explained["collide_most"]["layer"]["layer"] == "1"
    assert f"helpful and against collide most in layer 1: {worst(explained['layers'], 'layer')['sign_conflict']:.0%}" in collision(
        explained
    )
    assert DOWN in collision(explained)


def test_the_verb_writes_json_and_picture_and_no_model(parents: Path, tmp_path: Path) -> None:
    words = ["merge", str(parents / "helpful"), str(parents / "harmless"), "--base", str(parents / "base")]
    done = CliRunner().invoke(app, [*words, "--explain", str(tmp_path / "why")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == ["explain.json", "explain.png"]
    assert json.loads((tmp_path / "why" / "explain.json").read_text())["models"].keys() == {"helpful", "harmless"}
    assert "helpful and harmless collide most in" in done.output


def test_values_that_are_not_finite_are_refused(parents: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(parents / "helpful")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    values = {"base": str(parents / "base"), "models": [str(parents / "harmless"), str(tmp_path / "broken")]}
    with pytest.raises(DataError, match=f"{DOWN} has values that are not finite"):
        explain(plan_merge(*load_merge(None, values | {"method": "ties", "out": "none"}, [])))
