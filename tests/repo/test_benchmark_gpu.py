"""The programme of a GPU in one command: rehearsed on a CPU, with parts that fail or take too long."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.repo.benchmarking import ROOT, benchmark

MERGING_KERNELS = {
    "Gram matrix, fp32",
    "Gram matrix, fp64",
    "eigh of the Gram matrix, fp64",
    "h3scale, TSV-M",
    "torch.linalg.svd, fp32",
    "torch.linalg.svd, TSV-M",
}


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
