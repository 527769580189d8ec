"""Merged weights against mergekit's, tensor by tensor.

mergekit wants other versions than h3scale and gets an environment of its own (benchmarks/README.md: `peers/mergekit`);
H3SCALE_MERGEKIT is its python where it is elsewhere.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from h3scale.config.merge import load_merge
from h3scale.fusion.merge import How, merge
from tests.tiny import tiny_aligned, tiny_llama

PYTHON = Path(os.environ.get("H3SCALE_MERGEKIT", Path(__file__).parents[2] / "peers" / "mergekit" / "bin" / "python"))
pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason=f"needs mergekit in an environment of its own: no {PYTHON}")

TOLERANCE = 1e-6  # relative Frobenius distance of a tensor, both in fp32
FAR, NEAR = ["far-0", "far-1", "far-2"], ["near-0", "near-1"]
OURS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "linear": ("linear", FAR, {"weights": [1.0, 2.0, 0.5]}),
    "task_arithmetic": ("task_arithmetic", FAR, {"weights": [1.0, -0.5, 0.3]}),
    "ties": ("ties", FAR, {"density": 0.3, "weights": [1.0, 2.0, 0.5]}),
    "slerp": ("slerp", FAR[:2], {"t": 0.3}),
    "slerp of models almost parallel": ("slerp", NEAR, {"t": 0.3}),
}
RUN = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, write_model_card=False, quiet=True)
for out, config in json.loads(sys.argv[1]).items():
    run_merge(MergeConfiguration.model_validate(config), out, options)
"""


def theirs(place: Path, method: str, models: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """The same for mergekit."""
    weights = values.get("weights", [None] * len(models))
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    config["models"] = [
        {"model": str(place / model), "parameters": {} if weight is None else {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    if method == "slerp":
        return config | {"base_model": str(place / models[0]), "parameters": {"t": values["t"]}}
    config["parameters"] = {"normalize": method != "task_arithmetic"} | ({"density": values["density"]} if method == "ties" else {})
    return config if method == "linear" else config | {"base_model": str(place / "base")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, models, and what mergekit makes of them, in one process of its own."""
    place = tmp_path_factory.mktemp("mergekit")
    base = tiny_llama(place / "base")
    for labels, amount in ((FAR, 0.2), (NEAR, 1e-4)):
        for seed, label in enumerate(labels):
            tiny_aligned(place / label, base, seed, ffn_only=False, amount=amount)
    asked = {str(place / f"theirs {name}"): theirs(place, *ours) for name, ours in OURS.items()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(PYTHON), "-c", RUN, json.dumps(asked)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.mark.parametrize("name", OURS)
def test_merged_tensors_are_mergekits(place: Path, tmp_path: Path, name: str) -> None:
    method, models, values = OURS[name]
    given = {"base": str(place / "base"), "models": [str(place / model) for model in models], "method": method, **values}
    merge(*load_merge(None, given | {"out": str(tmp_path / "out")}, []), how=How(fsync=False))
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted: dict[str, torch.Tensor] = {}
    for path in (place / f"theirs {name}").glob("*.safetensors"):
        wanted |= load_file(path)
    assert found.keys() == wanted.keys()
    far = {key: float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in found}
    assert max(far.values()) < TOLERANCE, max(far.items(), key=lambda item: item[1])
