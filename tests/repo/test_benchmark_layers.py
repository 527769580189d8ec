"""Layers of experts and whole steps: every contender computes the same, is cleared alike, and may fail alone."""

import json
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from h3scale.model.trainable import group_of
from tests.repo.benchmarking import ROOT, benchmark

LAYER_FIGURES = {"tflops", "of_matmul", "beside_dense", "h3scale_is_faster", "experts", "tokens", "load", "dtype", "cpu_s_median"}


LAYER_PEERS = {
    "h3scale in transformers",
    "h3scale in AutoEP",
    "transformers, eager",
    "transformers, grouped_mm",
    "transformers, batched_mm",
    "H3Fusion's scheme",
    "DeepSpeed, AutoEP",
    "MegaBlocks dMoE, block-sparse",
    "MegaBlocks dMoE, grouped",
    "dense, the same rows",
}


STEP_PEERS = {
    "h3scale",
    "h3scale with DeepSpeed's experts",
    "h3scale, dense of the same active size",
    "transformers, eager experts",
    "transformers, grouped_mm experts",
    "transformers, grouped_mm experts, padded rows",
    "H3Fusion's scheme",
    "h3scale, LoRA",
    "transformers, grouped_mm experts, padded rows, LoRA by peft",
}


MEGABLOCKS = pytest.mark.megablocks


HIDDEN, INNER = 128, 256  # MegaBlocks has blocks of 128


EVERY_PEER = [pytest.param(name, marks=MEGABLOCKS if "MegaBlocks" in name else ()) for name in sorted(LAYER_PEERS)]


def test_a_layer_is_timed_beside_all_peers_that_give_the_same_and_those_that_are_missing_say_why(tmp_path: Path) -> None:
    """The script itself compares outputs and gradients with float64; of a peer that is off, the row says so."""
    out = tmp_path / "layer.json"
    done = benchmark("moe_layer.py", "--tiny", "--dirty", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    subjects = json.loads(out.read_text())["subjects"]
    for name in ("layer", "loads", "few_tokens"):
        rows = subjects[name]["rows"]
        assert {row["what"] for row in rows} == LAYER_PEERS, name
        assert all("not_run" in row or set(row) >= LAYER_FIGURES for row in rows), name
        assert not any("off by" in row.get("not_run", "") for row in rows), name
    assert {row["load"] for row in subjects["loads"]["rows"]} == {"balanced", "zipf", "worst"}
    timed = {row["what"] for row in subjects["few_tokens"]["rows"] if "not_run" not in row}
    assert {name for name in LAYER_PEERS if "MegaBlocks" not in name} <= timed
    assert any("matmul" in row["what"] for row in subjects["ceilings"]["rows"])


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of moe_layer.py, as it is imported beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("moe_speed")


def leaves_of(output: torch.Tensor) -> list[torch.Tensor]:
    """All that a backward from here gives a gradient, by autograd's own graph."""
    found, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        waiting += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", EVERY_PEER)
def test_all_weights_of_a_contender_are_cleared_before_a_round_and_compared_with_float64(layers: Any, name: str) -> None:
    """A gradient that stays would be added to, which takes longer; one that is wrong is noticed, whichever it is."""
    sizes = layers.Sizes(3, HIDDEN, INNER, torch.float32, "cpu")
    weights = layers.Weights.draw(sizes)
    hidden_TH = layers.peers.tokens(sizes, 16, "balanced")
    grad_TH = torch.randn_like(hidden_TH)
    wanted = layers.peers.reference(weights, hidden_TH, grad_TH)
    contender = layers.peers.make(name, sizes, weights, 16)
    output = contender.forward(hidden_TH)
    leaves = leaves_of(output)
    output.backward(grad_TH)
    experts, router = (1, 0) if name == layers.DENSE else (3, 3 * HIDDEN)
    assert sum(leaf.numel() for leaf in leaves) == experts * 3 * HIDDEN * INNER + router
    assert all(leaf.grad is not None for leaf in leaves)
    contender.clear()
    assert all(leaf.grad is None for leaf in leaves)
    if name == layers.DENSE:  # it has weights of one expert, and no peer's numbers
        return
    layers.check(name, contender, hidden_TH, grad_TH, wanted, torch.float32)
    for leaf in leaves:
        contender.clear()
        doubled = leaf.register_hook(lambda gradient: 2 * gradient)
        with pytest.raises(AssertionError, match=f"{name}: .* is off by"):
            layers.check(name, contender, hidden_TH, grad_TH, wanted, torch.float32)
        doubled.remove()


def failing(works: Any, fails: str, at: int, error: Exception) -> Any:
    """`make` of moe_peers, with a contender that has this error at its n-th forward."""
    made = works.make

    def make(name: str, *words: Any) -> Any:
        contender = made(name, *words)
        if name == fails:
            forward, calls = contender.forward, iter(range(1000))

            def fail(hidden_TH: torch.Tensor) -> torch.Tensor:
                if next(calls) >= at:
                    raise error
                return forward(hidden_TH)  # type: ignore[no-any-return]

            contender.forward = fail
        return contender

    return make


ERRORS = [
    (
        0,
        RuntimeError("CUDA error: an illegal memory access\nwas encountered"),
        "RuntimeError: CUDA error: an illegal memory access",
    ),
    (1, torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
    (2, KeyError(), "KeyError"),
]


@pytest.mark.parametrize(("at", "error", "line"), ERRORS)
def test_a_peer_that_fails_is_a_line_and_the_others_are_timed(
    layers: Any, monkeypatch: pytest.MonkeyPatch, at: int, error: Exception, line: str
) -> None:
    """When it is compared, in the round that does not count, and in one that does."""
    monkeypatch.setattr(layers.peers, "make", failing(layers.peers, "transformers, eager", at, error))
    rows = {row["what"]: row for row in layers._case(layers.Shape(3, 24, 64, 96), True)}
    assert set(rows) == LAYER_PEERS
    assert rows["transformers, eager"]["not_run"] == line
    timed = {name for name, row in rows.items() if "not_run" not in row}
    assert timed >= {"h3scale in transformers", "h3scale in AutoEP", "transformers, grouped_mm", "H3Fusion's scheme"}


@pytest.mark.parametrize("name", ["h3scale in transformers", "h3scale in AutoEP", "dense, the same rows"])
def test_ours_that_fails_is_an_error(layers: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(layers.peers, "make", failing(layers.peers, name, 1, RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(layers._case(layers.Shape(3, 24, 64, 96), True))


def test_a_run_that_ends_early_leaves_what_it_has_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole subjects, and the rows of the one that it was at."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "result.json"
    words = Namespace(only=["first", "second", "third"], out=out)

    def rows(name: str, work: Path) -> Any:
        yield {"what": f"{name} row"}
        if name == "second":
            raise RuntimeError("the machine is wanted back")

    with pytest.raises(RuntimeError, match="wanted back"):
        import_module("measure").run_subjects("script.py", words, (), rows)
    subjects = json.loads(out.read_text())["subjects"]
    assert subjects["first"]["rows"] == [{"what": "first row"}]
    assert "unfinished" not in subjects["first"]
    assert subjects["second"] == {"unfinished": True, "rows": [{"what": "second row"}]}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_a_step_is_timed_beside_all_peers_from_the_same_loss_on_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_on_gpu: bool
) -> None:
    """With a GPU's settings in bf16, one after the other."""
    monkeypatch.setenv("BENCHMARK_AS_ON_GPU", str(int(as_on_gpu)))
    out = tmp_path / "step.json"
    done = benchmark("train_step.py", "--tiny", "--dirty", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["what"]: row for row in json.loads(out.read_text())["subjects"]["step"]["rows"]}
    assert set(rows) == STEP_PEERS
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert all(rows[name]["of_matmul"] > 0 for name in rows if name.startswith("h3scale"))
    assert rows["H3Fusion's scheme"]["padding"] > rows["transformers, grouped_mm experts"]["padding"]
    assert {name for name, row in rows.items() if row["beside"] == "h3scale, LoRA"} == {
        "transformers, grouped_mm experts, padded rows, LoRA by peft"
    }


def test_peft_trains_what_h3scale_trains_with_lora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers, models = import_module("train_peers"), import_module("train_models")
    models.write_fused(tmp_path / "model", models.TINY, 1, 0)
    peer = peers.make(peers.PEFT, tmp_path, torch.device("cpu"))
    trained = {name for name, parameter in peer.model.named_parameters() if parameter.requires_grad}
    assert Counter(group_of(name.removeprefix("base_model.model.")) for name in trained) == {"experts": 2, "router": 1, "lora": 8}
    assert len(peer.trained) == len(trained)


class Answering:
    """In place of ranks: the same loss, and exit where it is asked for."""

    def __init__(self, ends: bool):
        self.ends = ends

    def ask(self, question: str) -> list[dict[str, float]]:
        if self.ends:
            raise RuntimeError("train_peers.py: a rank ended with exit 1")
        return [{"lm": 8.0, "tokens": 100, "cpu_s": 1.0, "wall_s": 1.0}]

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("ends", "error"),
    [("H3Fusion's scheme", None), ("h3scale, LoRA", "h3scale, LoRA: train_peers.py"), ("h3scale", "a rank ended")],
)
def test_where_steps_come_one_after_the_other_one_that_ends_is_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: str, error: str | None
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed = import_module("step_speed")
    for name in ("write_records", "write_fused", "write_dense", "write_deepspeed"):
        monkeypatch.setattr(speed, name, lambda *_, **__: None)
    monkeypatch.setattr(speed, "AS_ON_GPU", True)
    names = (*(speed.OURS, speed.DENSE, speed.OURS_LORA, speed.DEEPSPEED), *speed.OTHERS)
    answering = {name: speed.Contender(partial(Answering, name == ends)) for name in names}
    monkeypatch.setattr(speed, "_contenders", lambda *_: iter(answering.items()))
    rows = []
    with pytest.raises(RuntimeError, match=error) if error else nullcontext():
        for row in speed.step(True, tmp_path):
            rows.append(row)  # what comes before an error counts
    if ends != "h3scale":
        assert {row["what"] for row in rows} == STEP_PEERS
        assert [row["what"] for row in rows if "not_run" in row] == [ends]
