"""Law 7 for every loss by itself and all together, under real DeepSpeed: gloo ranks, ZeRO-1 to 3, expert parallelism."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from tests.distributed.dump_gradients import START_SHARE
from tests.distributed.reference import Forward
from tests.distributed.test_train import make_world
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

EXPERTS = ("helpful", "helpful", "harmless", None, "honest", "honest", "honest", "harmless")
NOTHING = ["router.loss_weight=0", "drift.gammas={}", "drift.gamma=0"]
GAMMAS = "drift.gammas={helpful: 2.0, general: 0.0}"
CASES = {
    "lm": NOTHING,
    "router, prompt": [*NOTHING, "router.loss_weight=0.5", "router.vote=prompt"],
    "router, response": [*NOTHING, "router.loss_weight=0.5", "router.vote=response"],
    "router, both": [*NOTHING, "router.loss_weight=0.5"],
    "z": [*NOTHING, "router.z_weight=0.2"],
    "balance": [*NOTHING, "router.balance_weight=0.7"],
    "drift of weights": [*NOTHING, "drift.gamma=0.3", GAMMAS],
    "drift of activations": [*NOTHING, "drift.gamma=0.3", GAMMAS, "drift.kind=activations"],
    "all": ["router.vote=response", "router.z_weight=0.2", "router.balance_weight=0.7", "drift.kind=activations"],
}
LAUNCHES = {
    "one rank": (1, "ep_size=1"),
    "2 ranks, EP 1": (2, "ep_size=1"),
    "2 ranks, EP 2": (2, "ep_size=2"),
    "4 ranks, EP 1": (4, "ep_size=1"),
    "4 ranks, EP 2": (4, "ep_size=2"),
    "4 ranks, EP 4": (4, "ep_size=4"),
    "1 rank, ZeRO-2": (1, "ep_size=1", "deepspeed=WORLD/zero2.json"),
    "4 ranks, EP 2, ZeRO-2": (4, "ep_size=2", "deepspeed=WORLD/zero2.json"),
    "4 ranks, EP 1, ZeRO-1": (4, "ep_size=1", "deepspeed=WORLD/zero1.json"),
    "2 ranks, EP 2, recomputed": (2, "ep_size=2", "activation_checkpointing=true"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), EXPERTS)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["prompt_weight"] = 0.25
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in (1, 2):
        settings = {"zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def references(world: Path):
    recipe = load_recipe(TrainRecipe, world / "recipe.yaml", [])
    forward = Forward(world / "moe", recipe)

    @cache
    def of(name: str):
        recipe = load_recipe(TrainRecipe, world / "recipe.yaml", CASES[name])
        reference = forward.losses(recipe, START_SHARE)
        return {name: term.item() for name, term in reference.terms.items()}, reference.gradients(recipe)

    return of


@pytest.fixture(scope="module")
def dumps(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(world, tmp_path_factory.mktemp("dumps"), LAUNCHES, CASES)


def dump(world: Path, out: Path, launches: dict, cases: dict) -> Path:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = [str(world / "recipe.yaml"), str(out), json.dumps(launches).replace("WORLD", str(world)), json.dumps(cases)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.dump_gradients", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(params=LAUNCHES)
def dumped(request, dumps: Path) -> Path:
    return dumps / request.param


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_single_process_autograd_on_every_topology(dumped: Path, references, case: str) -> None:
    losses, expected = references(case)
    line = json.loads((dumped / "lines.json").read_text())[case]
    for name in losses.keys() & line.keys():
        assert line[name] == pytest.approx(losses[name], rel=1e-6, abs=1e-6), name
    assert {"lm", "lm/helpful", "lm/harmless", "lm/honest", "router", "router_z"} <= losses.keys() & line.keys()
    assert ("router_balance" in line) == (case in ("balance", "all"))
    assert ("drift" in line) == (case.startswith("drift") or case == "all")
    parts = torch.load(dumped / "gradients.pt")[case]
    assert expected.keys() == parts[0].keys()
    for name, gradient in expected.items():
        found = torch.cat([part[name] for part in parts]) if ".experts." in name else parts[0][name]
        torch.testing.assert_close(found.double(), gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_every_loss_has_a_gradient_of_its_own(references) -> None:
    """Else equality above could hold for a loss that moves nothing."""
    _, alone = references("lm")
    for case in CASES.keys() - {"lm"}:
        _, gradients = references(case)
        part = "experts" if case.startswith("drift") else "router"
        moved = [(gradients[name] - alone[name]).abs().max() for name in alone if f".{part}." in name]
        assert min(moved) > 1e-4, case


def test_a_dense_model_has_the_same_gradients_when_it_computes_its_blocks_again(tmp_path: Path) -> None:
    world = make_world(tmp_path, ("helpful", "harmless"))
    overrides = [f"model={tiny_llama(tmp_path / 'dense')}", "activation_checkpointing=true", "trainable=[all]"]
    recipe = load_recipe(TrainRecipe, world / "recipe.yaml", overrides)
    out = dump(world, tmp_path / "out", {"dense": [2, *overrides]}, {"lm": []})
    expected = Forward(tmp_path / "dense", recipe).losses(recipe, START_SHARE).gradients(recipe)
    found = torch.load(out / "dense" / "gradients.pt")["lm"][0]
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, atol=1e-6, rtol=1e-5, msg=name)
