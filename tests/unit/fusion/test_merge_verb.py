"""What the merge verb refuses before it reads a model: folders that are in each other's way, options and devices that cannot be."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from h3scale.cli.main import app
from h3scale.errors import ConfigError, H3Error, UnsafeError, UsageError
from h3scale.fusion.parents import Parents
from tests.tiny import tiny_records
from tests.unit.fusion.merging import LABELS


def merged(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, words)])


def refused(kind: type[H3Error], *words: str | Path) -> str:
    """What is said of these words, in a line."""
    done = merged(*words)
    assert isinstance(done.exception, kind), done.exception or done.output
    [finding] = done.exception.findings
    return finding


@pytest.fixture
def models(family: Path, tmp_path: Path) -> Path:
    """Models of one's own, which a mistake may delete."""
    for name in ("base", *LABELS[:2]):
        shutil.copytree(family / name, tmp_path / "models" / name)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "validation.jsonl").write_text("{}\n")
    return tmp_path / "models"


def words_for(models: Path) -> list[Any]:
    return [*(models / label for label in LABELS[:2]), "--base", models / "base", "--method", "linear", "--force"]


SEARCHED = ["--search", "why", "--records", "records/validation.jsonl"]
IN_THE_WAY = [
    (["--explain", "models/base"], "explain: models/base would replace base: "),
    (["--explain", "models"], "explain: models would replace base: "),
    (["--explain", "models/helpful/why"], "explain: models/helpful/why lies in models.helpful: "),
    (["--explain", "out", "--out", "out"], "explain: out would replace out: "),
    ([*SEARCHED, "--out", "models/harmless"], "out: models/harmless would replace models.harmless: "),
    ([*SEARCHED, "--out", "models/harmless/out"], "out: models/harmless/out lies in models.harmless: "),
    ([*SEARCHED, "--out", "records"], "out: records would replace records: records/validation.jsonl"),
    ([*SEARCHED, "--out", "why/out"], "search: why would replace out: why/out"),
    ([*SEARCHED, "--out", "."], "out: . would replace base: "),
    (["--search", "records", *SEARCHED[2:], "--out", "out"], "search: records would replace records: "),
    (["--search", "out/why", *SEARCHED[2:], "--out", "out"], "search: out/why lies in out: out"),
]


@pytest.mark.parametrize(("words", "said"), IN_THE_WAY, ids=[" ".join(words) for words, _ in IN_THE_WAY])
def test_what_is_written_never_takes_away_what_is_read(
    models: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(models.parent)
    before = {path: path.read_bytes() for path in models.parent.rglob("*") if path.is_file()}
    done = merged(*words_for(models), *words)
    assert isinstance(done.exception, UnsafeError), done.exception or done.output
    assert any(finding.startswith(said) for finding in done.exception.findings), done.exception.findings
    assert {path: path.read_bytes() for path in models.parent.rglob("*") if path.is_file()} == before


UNLIKELY = [
    (["--explain", "why", *SEARCHED], "merge: --explain merges nothing and --search merges what is best (works: one of them)"),
    (["--explain", "why", "--dry-run"], "merge: --dry-run writes nothing and --explain does (works: one of them)"),
    (
        ["--exclude-source", "stub"],
        "merge: --exclude-source is for the records of --search (works: --search DIR --records validation.jsonl)",
    ),
    ([*SEARCHED, "--dry-run"], "merge: --dry-run writes nothing and --search does (works: one of them)"),
]


@pytest.mark.parametrize(("words", "said"), UNLIKELY, ids=[" ".join(words) for words, _ in UNLIKELY])
def test_options_that_exclude_each_other_are_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(models.parent)
    assert refused(UsageError, *words_for(models), "--out", "out", *words) == said
    assert sorted(path.name for path in models.parent.iterdir()) == ["models", "records"]


VERBS: dict[str, list[str]] = {
    "merge": ["--out", "out"],
    "dry run": ["--out", "out", "--dry-run"],
    "explain": ["--explain", "why"],
    "search": ["--out", "out", *SEARCHED],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("device", ["gpu", "meta", "cuda", "cuda:0", "cuda:2", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_by_all_that_merge_does(
    models: Path, monkeypatch: pytest.MonkeyPatch, verb: str, device: str
) -> None:
    monkeypatch.chdir(models.parent)
    gpus = 2 if device == "cuda:2" else 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpus))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    works = "cpu, cuda, cuda:0, cuda:1" if gpus else "cpu"
    said = refused(UsageError, *words_for(models), *VERBS[verb], "--device", device)
    assert said == f"--device: '{device}' is not here (works: {works})"
    assert sorted(path.name for path in models.parent.iterdir()) == ["models", "records"]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "dry run"])
def test_a_gpu_whose_memory_is_used_up_is_one_line(models: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.chdir(models.parent)
    tiny_records(Path("records/validation.jsonl"), LABELS)

    def used_up(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    for name in ("_mapped", "base_rows"):
        monkeypatch.setattr(Parents, name, used_up)
    said = refused(ConfigError, *words_for(models), *VERBS[verb], "--no-fsync")
    assert said == "--device: cpu: CUDA out of memory. Tried to allocate 2.00 GiB. (works: fewer --workers, or --device cpu)"
    assert not {"out", "why"} & {path.name for path in models.parent.iterdir()}
