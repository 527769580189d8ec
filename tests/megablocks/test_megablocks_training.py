"""Training steps with MegaBlocks' experts through DeepSpeed's AutoEP, beside the same steps with the loop.

make test-megablocks
"""

import json
from pathlib import Path

import pytest

from h3scale.launch.local import rank_command, run_ranks
from tests.distributed.test_train import EXPERTS, make_world

pytestmark = pytest.mark.megablocks


def test_two_steps_are_those_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("NOTES", str(tmp_path))
    world = make_world(tmp_path, EXPERTS)
    found = {}
    for experts in ("loop", "megablocks_grouped"):
        out = tmp_path / experts
        words = [str(world / "recipe.yaml"), f"out={out}", "steps=2", f"experts={experts}"]
        assert run_ranks(rank_command("tests.distributed.note_experts", words), 1) == 0
        assert json.loads((tmp_path / "0.json").read_text()) == [experts]
        found[experts] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(found["loop"]) == 2
    for line, other in zip(found["megablocks_grouped"], found["loop"], strict=True):
        for name in ("lm", "router", "router_z", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)
