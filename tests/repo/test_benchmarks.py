"""The benchmarks work: a run of seconds, its table and the fields of its JSON. What they find is in benchmarks/results."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.repo.benchmarking import benchmark, tiny_result

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
