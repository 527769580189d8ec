"""The benchmarks work: a run of seconds, its table and the fields of its JSON. What they find is in benchmarks/results."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from h3scale.model.trainable import group_of

ROOT = Path(__file__).parents[2]
SUBJECTS = {"waste", "shares", "packed_tokens_per_s", "prepare", "prepare_at_scale", "planner", "memory", "resume"}
FIGURES = {
    "waste": {"row_tokens", "waste", "cut"},
    "shares": {"rows_per_batch", "batches", "equal_mean", "equal_p95", "own_mean", "own_p95"},
    "packed_tokens_per_s": {"row_tokens", "tokens", "tokens_per_cpu_s", "tokens_per_wall_s", "ours_is_faster", "cpu_s_median"},
    "prepare": {"tokens", "tokens_per_cpu_s", "ratio", "ratio_of_medians", "cpu_s_min", "wall_s_median"},
    "prepare_at_scale": {"records", "tokens", "tokens_per_wall_s", "ratio", "cpu_ratio", "wall_s_min"},
    "planner": {"row_tokens", "records_per_cpu_s", "waste", "cpu_s_min", "cpu_s_median"},
    "memory": {"records", "seconds", "parent_anon_mib", "parent_rss_mib", "worker_anon_mib", "worker_rss_mib"},
    "resume": {"records", "seconds_min", "seconds_median", "open_s", "plan_s", "batch_s"},
}
PEERS = {"waste": "TRL", "shares": "TRL", "packed_tokens_per_s": "TRL", "planner": "TRL"}


TRAIN_FIGURES = {
    "start_memory": {"parameters", "ranks", "shard_mib", "layer_experts_mib", "held_mib", "peak_mib", "above_held_in_units"},
    "speed": {"ranks", "first_lm", "tokens", "tokens_per_cpu_s", "tokens_per_wall_s", "h3scale_is_faster", "cpu_s_median"},
    "overhead": {"beside", "share", "share_by_rounds", "cpu_s_min", "wall_s_median"},
}
TRAIN_PEERS = {
    "start_memory": {"from_pretrained under zero.Init", "the whole model on every rank"},
    "speed": {
        "transformers, eager experts",
        "transformers, grouped_mm experts",
        "H3Fusion's scheme",
        "dense of the same active size",
    },
    "overhead": {"LM alone, no metrics"},
}


CHECKPOINT_FIGURES = {
    "dense": {"parameters", "rounds", "wall_s_min", "wall_s_median"},
    "experts": {"parameters", "rounds", "wall_s_min", "mb_on_disk"},
    "memory": {"parameters", "peak_anon_mib", "above_tiny_mib"},
}
CHECKPOINT_PEERS = {
    "dense": {
        "cp of the output",
        "cp of the input",
        "cp of the output, sha256 of it",
        "zero_to_fp32, fp32",
        "zero_to_fp32, bf16",
        "torch DCP, fp32",
    },
    "experts": {"ds_to_universal"},
}
MERGE_FIGURES = {
    "streamed": {"parameters", "rounds", "cpu_s_min", "cpu_s_median", "wall_s_min", "error", "times_cp_of_parents"},
    "adapters": {"parameters", "rounds", "cpu_s_min", "times_linear"},
    "memory": {"parameters", "largest_tensor_mib", "peak_anon_mib", "above_tiny_mib"},
    "spectral": {"deltas", "shape", "rounds", "cpu_s_min", "faster_than_svd"},
    "oracle": {"deltas", "shape", "error"},
}
MERGE_PEERS = {"streamed": {"cp of the parents", "mergekit, ties"}, "oracle": {"torch.linalg.svd, tsv_m"}}

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

MERGING_KERNELS = {
    "Gram matrix, fp32",
    "Gram matrix, fp64",
    "eigh of the Gram matrix, fp64",
    "h3scale, TSV-M",
    "torch.linalg.svd, fp32",
    "torch.linalg.svd, TSV-M",
}
MEGABLOCKS = pytest.mark.megablocks
HIDDEN, INNER = 128, 256  # MegaBlocks has blocks of 128
EVERY_PEER = [pytest.param(name, marks=MEGABLOCKS if "MegaBlocks" in name else ()) for name in sorted(LAYER_PEERS)]


def benchmark(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def tiny_result(script: str, folder: Path, subjects: Iterable[str], *words: str) -> dict[str, Any]:
    out = folder / f"{script}.json"
    done = benchmark(script, "--tiny", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n{name}  (" in done.stdout for name in subjects)
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_result("data.py", tmp_path_factory.mktemp("benchmark"), SUBJECTS)


@pytest.fixture(scope="module")
def tiny_train(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_result("train.py", tmp_path_factory.mktemp("benchmark"), TRAIN_FIGURES)


def test_every_subject_has_its_figures_and_what_they_depend_on(tiny: dict[str, Any]) -> None:
    assert set(tiny["subjects"]) == SUBJECTS
    for name, subject in tiny["subjects"].items():
        for row in subject["rows"]:
            assert "not_run" in row or FIGURES[name] <= set(row), (name, row)
        assert any("not_run" not in row for row in subject["rows"])
    assert {"cpu", "isa", "cores", "load_average", "load_average_at_end"} <= set(tiny["machine"])
    assert {"python", "torch", "numpy", "datasets", "tokenizers", "transformers", "trl", "h3scale"} <= set(tiny["versions"])
    assert tiny["corpus"]["tokens"] > 0
    assert tiny["command"].startswith("python benchmarks/data.py --tiny")
    assert "/" not in tiny["command"].removeprefix("python benchmarks/data.py")


def test_a_peer_that_is_not_installed_is_named(tiny: dict[str, Any]) -> None:
    for name, peer in PEERS.items():
        rows = [row for row in tiny["subjects"][name]["rows"] if peer in row["what"]]
        assert rows
        assert all(row.get("not_run") == "not installed" for row in rows) is (find_spec("trl") is None)


def test_every_subject_of_training_has_its_figures_and_its_peers(tiny_train: dict[str, Any]) -> None:
    assert set(tiny_train["subjects"]) == set(TRAIN_FIGURES)
    for name, subject in tiny_train["subjects"].items():
        assert all(TRAIN_FIGURES[name] <= set(row) for row in subject["rows"]), name
        assert TRAIN_PEERS[name] < {row["what"] for row in subject["rows"]}
    assert {"cpu", "cores", "device", "load_average", "load_average_at_end"} <= set(tiny_train["machine"])
    assert {"torch", "transformers", "deepspeed", "h3scale"} <= set(tiny_train["versions"])
    assert tiny_train["command"] == "python benchmarks/train.py --tiny --out train.py.json"


def test_what_is_timed_trains_the_same_model_on_the_same_records(tiny_train: dict[str, Any]) -> None:
    rows = {row["what"]: row for row in tiny_train["subjects"]["speed"]["rows"]}
    ours = rows["h3scale, ZeRO-3"]
    others = [row for name, row in rows.items() if not name.startswith("dense")]
    assert all(abs(row["first_lm"] - ours["first_lm"]) < 1e-4 for row in others)
    assert {row["tokens"] for row in rows.values()} == {ours["tokens"]}
    assert rows["H3Fusion's scheme"]["padding"] > rows["transformers, eager experts"]["padding"]


def test_every_subject_of_the_checkpoint_tools_has_its_figures_and_its_peers(tmp_path: Path) -> None:
    result = tiny_result("checkpoint.py", tmp_path, CHECKPOINT_FIGURES)  # which compares what they write, bit for bit
    assert set(result["subjects"]) == set(CHECKPOINT_FIGURES)
    for name, subject in result["subjects"].items():
        assert all(CHECKPOINT_FIGURES[name] <= set(row) for row in subject["rows"]), name
        assert CHECKPOINT_PEERS.get(name, set()) < {row["what"] for row in subject["rows"]}
    assert result["command"] == "python benchmarks/checkpoint.py --tiny --out checkpoint.py.json"


@pytest.mark.slow
def test_what_saves_cost_and_that_kills_cost_nothing_but_time(tmp_path: Path) -> None:
    """The script itself compares the losses of a run that is killed with those of one that is not."""
    result = tiny_result("resume.py", tmp_path, ("save", "kills"))
    rows = {row["what"]: row for row in result["subjects"]["save"]["rows"]}
    assert {"h3scale", "h3scale, in the background: begins", "DeepSpeed, without hashes and fsync", "cp and fsync"} < set(rows)
    assert all(row["median_s"] > 0 for row in rows.values())
    assert result["subjects"]["kills"]["rows"][-1]["times"] > 0


def check_merging(result: dict[str, Any], subjects: Iterable[str]) -> None:
    for name in subjects:
        rows = result["subjects"][name]["rows"]
        ours = [row for row in rows if row["what"].startswith("h3scale") and "sha256" not in row["what"]]
        assert ours
        assert all(MERGE_FIGURES[name] <= set(row) for row in ours), name
        assert MERGE_PEERS.get(name, set()) <= {row["what"] for row in rows}


def test_merging_is_exact_where_it_is_timed_beside_full_svds(tmp_path: Path) -> None:
    subjects = ("spectral", "oracle")
    result = tiny_result("merge.py", tmp_path, subjects, "--only", ",".join(subjects))
    check_merging(result, subjects)
    rows = result["subjects"]["oracle"]["rows"]
    ours = [row for row in rows if row["what"].startswith("h3scale")]
    assert all(row["error"] < 1e-5 for row in ours if "from_factors" not in row)
    assert all(min(row["error"], row["from_factors"]) < 1e-3 for row in ours if "from_factors" in row)  # one of the two, never both
    assert {row["deltas"].split(",")[0] for row in rows} == {"dense", "LoRA rank 8", "LoRA rank 8 in fp32 weights"}
    assert result["subjects"]["oracle"]["worst"]["h3scale, tsv_m"] == max(r["error"] for r in ours if r["what"].endswith("tsv_m"))


@pytest.mark.slow
def test_every_subject_of_merging_has_its_figures_and_its_peers(tmp_path: Path) -> None:
    result = tiny_result("merge.py", tmp_path, MERGE_FIGURES, "--mergekit", str(tmp_path / "nowhere"))
    check_merging(result, MERGE_FIGURES)
    streamed = {row["what"]: row for row in result["subjects"]["streamed"]["rows"]}
    assert all("not_run" in row for name, row in streamed.items() if name.startswith("mergekit"))
    assert result["versions"]["mergekit"] is None
    assert result["command"].startswith("python benchmarks/merge.py --tiny")


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


def test_all_of_a_gpu_is_rehearsed_on_a_cpu_and_what_needs_cuda_says_so(tmp_path: Path) -> None:
    done = benchmark("gpu.py", "--tiny", "--budget", "5", "--out", str(tmp_path), "--only", "ceilings,layer_again,tests,merging")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    parts = result["subjects"]
    assert {name: part["state"] for name, part in parts.items()} == {
        **dict.fromkeys(("ceilings", "merging"), "done"),
        **dict.fromkeys(("layer_again", "tests"), "not run"),
    }
    assert parts["tests"]["reason"] == "needs a CUDA device"
    assert (
        result["command"]
        == f"python benchmarks/gpu.py --tiny --budget 5 --out {tmp_path.name} --only ceilings,layer_again,tests,merging"
    )
    rows = json.loads((tmp_path / parts["merging"]["result"]).read_text())["subjects"]["kernels"]["rows"]
    assert {row["what"]: row["wall_s_min"] > 0 for row in rows} == dict.fromkeys(MERGING_KERNELS, True)
    assert rows[-1]["apart"] < 1e-3
    assert rows[-1]["h3scale_is_faster"] > 0
    assert "matmul 256^3" in (tmp_path / "gpu.log").read_text()


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    done = benchmark("gpu.py", "--tiny", "--budget", "10", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["subjects"]
    assert {name for name, part in parts.items() if part["state"] == "done"} == {"ceilings", "layer", "step", "merging"}
    assert all((tmp_path / part["result"]).exists() for part in parts.values() if part["state"] == "done")
    layers = json.loads((tmp_path / "moe_layer_gpu.json").read_text())["subjects"]
    assert set(layers) == {"layer", "loads", "few_tokens"}


def test_a_part_that_fails_or_takes_too_long_says_so_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = import_module("gpu")
    out, late = tmp_path / "out", tmp_path / "late"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(late)!r}).touch()"
    parts = {
        "fails": "print('first'); raise SystemExit('it broke')",
        "again": f'assert \'"state": "failed"\' in open({str(out / "gpu.json")!r}).read()',
        "not_again": "",
        "writes": f"open({str(out / 'writes.json')!r}, 'w').write('1')",
        "late": f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])",
        "never": "",
    }
    after = {"again": "fails", "not_again": "writes"}
    made = {name: gpu.Part(["-c", text], after=after.get(name, "")) for name, text in parts.items()}
    made["writes"] = gpu.Part(made["writes"].words, "writes.json")
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    monkeypatch.setattr(gpu, "_device", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--budget", "0.1", "--out", str(out)])
    began = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - began < 15  # it did not wait for what was late
    found = json.loads((out / "gpu.json").read_text())["subjects"]
    states = {name: part["state"] for name, part in found.items()}
    wanted = {
        "fails": "failed",
        "again": "done",
        "not_again": "not run",
        "writes": "done",
        "late": "out of time",
        "never": "not run",
    }
    assert states == wanted
    assert (found["fails"]["exit"], found["fails"]["reason"]) == (1, "it broke")
    assert found["fails"]["said"] == ["first", "it broke"]
    assert found["not_again"]["reason"] == "writes has not failed"
    assert found["writes"]["result"] == "writes.json"
    assert found["late"]["said"] == ["begun"]
    assert found["never"]["reason"] == "0 s were left"
    time.sleep(max(0.0, began + 15 - time.monotonic()))
    assert not late.exists()  # what it had started is ended too


def test_without_a_gpu_only_the_rehearsal_runs(tmp_path: Path) -> None:
    done = benchmark("gpu.py", "--dirty", "--budget", "1", "--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device here (works: --tiny, to rehearse)" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of its own with the benchmarks; h3scale itself is imported from here."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "h3scale").mkdir()
    (tmp_path / "h3scale" / "code.py").write_text("ONE = 1\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)
    return tmp_path


def commit_of(folder: Path, **environment: str) -> str:
    """As a result in this folder says it."""
    words = [sys.executable, "-c", "import measure; print(measure.versions(())['h3scale'])"]
    known = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), **environment}
    return subprocess.run(words, cwd=folder / "benchmarks", capture_output=True, text=True, check=True, env=known).stdout.strip()


CHANGED = ["h3scale/code.py", "h3scale/new.py", "benchmarks/moe_peers.py", "benchmarks/new.py"]


def test_a_result_says_whether_the_code_or_the_benchmarks_differ_from_their_commit(checkout: Path) -> None:
    clean = commit_of(checkout)
    assert len(clean) == 40
    for name in ("benchmarks/results/moe_layer.json", "benchmarks/results/new.json", "benchmarks/README.md", "README.md"):
        with (checkout / name).open("a") as file:  # what runs write
            file.write("\n")
        assert commit_of(checkout) == clean, name
    for name in CHANGED:
        path = checkout / name
        before = path.read_text() if path.exists() else None
        path.write_text((before or "") + "# one line\n")
        assert commit_of(checkout) == f"{clean}+", name
        path.unlink() if before is None else path.write_text(before)
    assert commit_of(checkout, BENCHMARK_COMMIT="another") == clean
    shutil.rmtree(checkout / ".git")
    assert commit_of(checkout) == "unknown"
    assert commit_of(checkout, BENCHMARK_COMMIT="its commit") == "its commit"


def test_a_result_of_a_tree_that_differs_from_its_commit_is_refused(checkout: Path) -> None:
    with (checkout / "benchmarks" / "moe_speed.py").open("a") as file:
        file.write("# one line\n")
    command = [sys.executable, "benchmarks/moe_layer.py", "--tiny", "--only", "ceilings", "--out", "result.json"]
    words: Any = {"cwd": checkout, "capture_output": True, "text": True, "check": False}
    words["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, **words)
    assert done.returncode == 2
    assert "differs from its commit (commit it, or --dirty)" in done.stderr
    assert not (checkout / "result.json").exists()
    subprocess.run(["git", "checkout", "--quiet", "benchmarks"], cwd=checkout, check=True)
    assert subprocess.run(command, **words).returncode == 0
    assert (checkout / "result.json").exists()


def test_a_start_needs_at_least_what_it_then_holds(tiny_train: dict[str, Any]) -> None:
    for row in tiny_train["subjects"]["start_memory"]["rows"]:
        assert row["peak_mib"] >= row["held_mib"] > row["shard_mib"] > 0


@pytest.mark.parametrize(
    ("script", "first"),
    [
        ("data.py", "waste"),
        ("train.py", "start_memory"),
        ("checkpoint.py", "dense"),
        ("merge.py", "streamed"),
        ("resume.py", "save"),
        ("moe_layer.py", "ceilings"),
        ("merging_kernels.py", "kernels"),
    ],
)
def test_a_subject_that_does_not_exist_is_refused(script: str, first: str) -> None:
    done = benchmark(script, "--only", "fastest")
    assert done.returncode == 2
    assert f"'fastest' is no subject (works: {first}" in done.stderr


def test_results_hold_the_command_the_commit_and_no_path() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        assert {"command", "machine", "versions", "subjects"} <= set(result), path.name
        assert result["versions"]["h3scale"] != "unknown", path.name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("benchmarks", "h3scale"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def tables(folder: Path) -> str:
    """What `python benchmarks/tables.py` says."""
    command = [sys.executable, "benchmarks/tables.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment).stdout


def test_the_tables_of_experts_and_steps_are_what_their_results_say(copy: Path) -> None:
    """In a copy: `python benchmarks/tables.py` leaves the README as it is, and a figure that was typed in does not stay."""
    readme = copy / "benchmarks" / "README.md"
    kept = readme.read_text()
    table = between(kept, "layer")
    readme.write_text(kept.replace(table, re.sub(r"\*\*\d", "**9", table, count=1)))
    assert readme.read_text() != kept
    tables(copy)
    assert readme.read_text() == kept


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]


def test_tables_of_a_gpu_are_written_where_its_results_are_there(copy: Path) -> None:
    """As rows are on a GPU, with shares of the matrix product; those that are absent are named."""
    results, readme = copy / "benchmarks" / "results", copy / "benchmarks" / "README.md"
    for name in ("moe_layer_gpu.json", "train_step_gpu.json", "train_step.json"):
        (results / name).unlink(missing_ok=True)
    kept = readme.read_text()
    said = tables(copy)
    assert readme.read_text() == kept
    assert "layer_gpu: no 'layer' in results/moe_layer_gpu.json, left as it is" in said
    assert "step: no 'step' in results/train_step.json, left as it is" in said
    sizes = [{"experts": 3, "tokens": 4096, "dtype": "bf16", "load": "balanced", "inner": inner} for inner in (11008, 14336)]
    rows = [{"what": "h3scale in AutoEP", **size, "tflops": 640.0, "of_matmul": 0.81, "beside_dense": 1.1} for size in sizes]
    rows.append({"what": "MegaBlocks dMoE, grouped", **sizes[0], "not_run": "CUDA error"})
    write_subject(results / "moe_layer_gpu.json", "layer", rows)
    step = {"what": "h3scale", "tokens_per_s": 17000.0, "padding": "", "h3scale_is_faster": 1.0, "mfu": 0.48, "of_matmul": 0.6}
    write_subject(results / "train_step_gpu.json", "step", [step])
    said = tables(copy)
    assert "no 'layer'" not in said
    assert "loads_gpu: no 'loads' in results/moe_layer_gpu.json" in said
    text = readme.read_text()
    assert "3 experts, 4,096 tokens, 11,008 wide" in between(text, "layer_gpu")
    assert "| h3scale in AutoEP | **640 (81%)** | **640 (81%)** |" in between(text, "layer_gpu")
    assert "| h3scale | 17,000 | 1.00 | 48% | 60% |" in between(text, "step_gpu")
    assert between(text, "layer") == between(kept, "layer")


def write_subject(path: Path, subject: str, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"subjects": {subject: {"rows": rows}}}))
