"""The search of a merge's scaling: a planted optimum, the budget, the changes that are kept, and what is written."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from h3scale.checkpoint.release import release
from h3scale.cli.main import app
from h3scale.cli.merge_choices import validation_records
from h3scale.config.merge import OPTIONS, load_merge
from h3scale.data.encode import encode_records
from h3scale.data.records import Record, write_records
from h3scale.data.sources import read_records
from h3scale.errors import ConfigError, DataError, OutputError
from h3scale.evaluation.evaluate import open_model
from h3scale.evaluation.score import score, score_encoded
from h3scale.fusion.merge import How, plan_merge
from h3scale.log import logger
from h3scale.study import merge_search
from h3scale.study.merge_search import axes_of, objective, search
from tests.tiny import tiny_llama, tiny_records, tiny_tokenizer

ALIGNMENTS = ("helpful", "harmless")
PLANTED = 0.6  # the models go 1 / PLANTED times as far as is best
NO_SYNC = How(fsync=False, workers=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two models that each have half of a few descents' change, gone too far."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama(folder / "base")
    records = read_records([tiny_records(folder / "validation.jsonl", ALIGNMENTS)])
    encoded = encode_records(tiny_tokenizer(), records)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    start = {name: values.detach().clone() for name, values in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(6):
        for item in encoded:
            tokens = torch.tensor([item.input_ids])
            (model(input_ids=tokens, labels=tokens).loss / len(encoded)).backward()
        optimizer.step()
        optimizer.zero_grad()
    change = {name: (values.detach() - start[name]) / PLANTED for name, values in model.named_parameters()}
    for number, label in enumerate(ALIGNMENTS):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, values in model.named_parameters():
                noise = 0.001 * torch.randn(values.shape, generator=generator)
                values.copy_(start[name] + change[name] / 2 + noise)
        model.save_pretrained(folder / label)
    return folder


def planned(world: Path, method: str, *overrides: str) -> Any:
    values = {"base": str(world / "base"), "models": [str(world / label) for label in ALIGNMENTS]}
    return plan_merge(*load_merge(None, values | {"method": method, "out": "none"}, list(overrides)))


def by_brute_force(world: Path) -> dict[float, float]:
    """The objective of the plain sum of the changes at many scalings."""
    model, tokenizer = open_model(world / "base")
    encoded = encode_records(tokenizer, read_records([world / "validation.jsonl"]))
    base = {name: values.clone() for name, values in model.state_dict().items()}
    others = [AutoModelForCausalLM.from_pretrained(world / label).state_dict() for label in ALIGNMENTS]
    found = {}
    for scaling in (i / 20 for i in range(31)):
        model.load_state_dict({name: b + scaling * sum(o[name] - b for o in others) for name, b in base.items()})
        found[scaling] = objective(score_encoded(model, encoded).records)
    return found


def test_the_planted_optimum_is_found_within_the_budget(world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    records = read_records([world / "validation.jsonl"])
    choice = search(planned(world, "task_arithmetic"), records, 9, tmp_path, NO_SYNC, said.append)
    curve = by_brute_force(world)
    assert 0.1 < min(curve, key=curve.__getitem__) < 1.4  # it is a valley, and neither end is its ground
    assert choice.result["best"]["nll"] <= min(curve.values()) + 1e-4
    assert choice.options.scaling == choice.result["best"]["point"]["scaling"]
    assert len(choice.result["trials"]) == len(said) <= 9
    assert choice.result["paired"]["the base"]["high"] < 0
    assert {"helpful", "harmless"} == choice.result["best"]["by_alignment"].keys()
    assert len(list(tmp_path.iterdir())) == 1  # one change, for all scalings


def test_the_first_so_many_records_of_each_alignment_are_searched_on(world: Path, tmp_path: Path) -> None:
    words = [str(world / label) for label in ALIGNMENTS] + ["--base", str(world / "base"), "--method", "linear", "--no-fsync"]
    more = ["--records", str(world / "validation.jsonl"), "--records-per-alignment", "2", "--budget", "3"]
    done = CliRunner().invoke(app, ["merge", *words, *more, "--search", str(tmp_path / "why"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "why" / "search.json").read_text())["records"] == 2 * len(ALIGNMENTS)


def test_records_of_an_excluded_source_are_not_searched_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    sources = ["a Template, filled in", "people", "stubs", "people", "template"]
    records = [Record(str(i), "helpful", f"q{i}", f"a{i}", source=source) for i, source in enumerate(sources)]
    write_records(path, records)
    assert [record.id for record in validation_records([path], ["template", "stub"], None)] == ["1", "3"]
    assert [record.id for record in validation_records([path], ["template"], 2)] == ["1", "2"], (
        "the first two of those that are left"
    )
    with pytest.raises(DataError, match="every record is of a source that --exclude-source names: t, p"):
        validation_records([path], ["t", "p"], None)


def test_what_was_searched_is_what_is_merged(world: Path, tmp_path: Path) -> None:
    words = [str(world / label) for label in ALIGNMENTS] + ["--base", str(world / "base"), "--method", "ties"]
    more = ["--records", str(world / "validation.jsonl"), "--budget", "6", "--no-hashes", "--no-fsync", "--dtype", "bfloat16"]
    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["merge", *words, *more, "--search", str(tmp_path / "why"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == ["search.json", "search.png"]
    result = json.loads((tmp_path / "why" / "search.json").read_text())
    told = json.loads((out / "merge.json").read_text())["options"]
    assert {key: told[key] for key in result["searched"]} == result["best"]["point"]
    assert result["searched"] == ["scaling", "density"]
    found = objective(score(*open_model(out), read_records([world / "validation.jsonl"])).records)
    assert found == pytest.approx(result["best"]["nll"], rel=1e-6)
    assert result["best"]["nll"] == min(trial["nll"] for trial in result["trials"])


def test_the_best_change_stays_on_disk_when_others_come_and_go(world: Path, tmp_path: Path) -> None:
    plan = planned(world, "ties", "scaling=0.6")
    records = read_records([world / "validation.jsonl"])
    scorer = merge_search.Scorer(plan, records, tmp_path, NO_SYNC)
    values = {}
    for density in (0.5, 0.02, 0.05, 1.0):
        values[density] = objective(scorer.scores(plan.options.model_copy(update={"density": density})))
        assert len(list(tmp_path.iterdir())) <= 2
    best = min(values, key=values.__getitem__)
    made = scorer.made
    assert objective(scorer.scores(plan.options.model_copy(update={"density": best}))) == values[best]
    assert scorer.made == made


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_has_something_to_search_and_what_is_given_is_left_alone(method: str) -> None:
    options = OPTIONS[method].model_validate({})
    axes = axes_of(method, options)
    for axis in axes:
        assert axis.low <= min(axis.starts) <= max(axis.starts) <= axis.high
        for end in (axis.low, axis.high, *axis.starts):
            type(options).model_validate({axis.key: end})
    first = OPTIONS[method].model_validate({axes[0].key: axes[0].starts[-1]})
    if len(axes) > 1:
        assert [axis.key for axis in axes_of(method, first)] == [axis.key for axis in axes[1:]]


def test_records_without_a_search_and_a_search_with_nothing_left_are_refused(world: Path, tmp_path: Path) -> None:
    words = ["merge", *[str(world / label) for label in ALIGNMENTS], "--base", str(world / "base"), "--out", str(tmp_path / "out")]
    words += ["--method", "linear"]
    done = CliRunner().invoke(app, [*words, "--records", "validation.jsonl"])
    assert done.exit_code != 0
    assert "--search and --records need each other" in str(done.exception)
    more = ["--search", str(tmp_path / "why"), "--records", str(world / "validation.jsonl"), "scaling=1"]
    done = CliRunner().invoke(app, [*words, *more])
    assert "nothing is left to search, as scaling is given" in str(done.exception)
    done = CliRunner().invoke(app, [word for word in [*words, *more[:-1]] if word not in ("--base", str(world / "base"))])
    assert isinstance(done.exception, ConfigError)
    assert "base: is required by linear where scaling is searched" in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "free", "placed"),
    [("cpu", 1 << 40, []), ("cuda:0", 1 << 40, ["cuda:0"]), ("cuda:0", 1 << 10, [])],
    ids=["asked for the CPU", "room on the GPU", "no room on the GPU"],
)
def test_records_are_scored_where_the_merge_is_computed_if_there_is_room(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    free: int,
    placed: list[str],
) -> None:
    """On a machine that seems to have a GPU."""
    moved: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (free, free))
    monkeypatch.setattr("torch.nn.Module.to", lambda self, where: moved.append(str(where)) or self)
    plan = planned(world, "linear")
    plan = dataclasses.replace(plan, parents=dataclasses.replace(plan.parents, device=torch.device(device)))
    monkeypatch.setattr(logger, "propagate", True)
    merge_search.Scorer(plan, read_records([world / "validation.jsonl"]), tmp_path, NO_SYNC)
    assert moved == placed
    assert ("are computed on the CPU" in caplog.text) == (device != "cpu" and not placed)


def test_each_thread_of_a_search_computes_by_itself(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    make = merge_search.Changes._make

    def seeing(self: merge_search.Changes, name: str) -> None:
        seen.append(torch.get_num_threads())
        make(self, name)

    monkeypatch.setattr(merge_search.Changes, "_make", seeing)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        plan = planned(world, "ties")
        merge_search.Changes(plan, plan.options, tmp_path / "change", dataclasses.replace(NO_SYNC, workers=2))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def words_to_search(world: Path, folder: Path, *more: str) -> list[str]:
    words = [str(world / label) for label in ALIGNMENTS] + ["--base", str(world / "base"), "--method", "ties", "--budget", "3"]
    words += ["--records", str(world / "validation.jsonl"), "--no-hashes", "--no-fsync", "--workers", "1"]
    return ["merge", *words, "--search", str(folder / "why"), "--out", str(folder / "merged"), *more]


def killed_in(where: str, times: int, words: list[str]) -> None:
    """Runs the verb in a process that dies, as by SIGKILL, when a function is called for so many times."""
    module, name = where.rsplit(".", 1)
    own, calls = getattr(importlib.import_module(module), name), []

    def dying(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **named)

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, dying)
            CliRunner().invoke(app, words)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_search_goes_on_wherever_it_was_killed_and_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_to_search(world, tmp_path)
    killed_in("h3scale.study.merge_search.score_encoded", 2, words)
    assert [path.name for path in tmp_path.rglob("change-*")] == ["change-0"]
    killed_in("h3scale.fusion.merge.write_shards", 1, words)
    assert not list(tmp_path.rglob("change-*"))
    written = (tmp_path / "why" / "search.json").read_bytes()

    def no_more(*_: Any) -> None:
        raise AssertionError("the search was over")

    monkeypatch.setattr(merge_search, "score_encoded", no_more)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "why"]
    assert (tmp_path / "why" / "search.json").read_bytes() == written
    best = json.loads(written)["best"]["point"]
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())["options"]
    assert {key: told[key] for key in best} == best


def test_another_search_is_not_taken_for_this_one(world: Path, tmp_path: Path) -> None:
    records = read_records([world / "validation.jsonl"])
    key = merge_search.search_key(planned(world, "ties"), records, 3)
    assert key == merge_search.search_key(planned(world, "ties"), list(records), 3)
    others = [
        merge_search.search_key(planned(world, "ties"), records, 4),
        merge_search.search_key(planned(world, "ties"), records[1:], 3),
        merge_search.search_key(planned(world, "dare_ties"), records, 3),
        merge_search.search_key(planned(world, "ties", "weights=[1, 2]"), records, 3),
        merge_search.search_key(planned(world, "ties", "density=0.2"), records, 3),  # the default, but given: it is not searched
    ]
    for name in ("config.json", "tokenizer.json"):
        (world / "base" / name).touch()
        others.append(merge_search.search_key(planned(world, "ties"), records, 3))
    assert len({key, *others}) == 1 + len(others)
    (tmp_path / "why").mkdir()
    (tmp_path / "why" / "search.json").write_text(json.dumps({"key": key}))
    done = CliRunner().invoke(app, words_to_search(world, tmp_path))
    assert isinstance(done.exception, OutputError), done.output
    assert "why: exists already" in str(done.exception)


def test_a_merge_that_was_searched_says_so_and_another_does_not(world: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, words_to_search(world, tmp_path))
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "why" / "search.json").read_text())
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())["search"]
    assert told == {key: result[key] for key in ("minimised", "searched", "budget", "records", "best", "paired")}
    release(tmp_path / "merged", tmp_path / "release", license="mit")
    card = (tmp_path / "release" / "README.md").read_text()
    assert f"scaling, density chosen by the likelihood of {result['records']} validation records" in card
    best = [f"{key}={value}" for key, value in result["best"]["point"].items()]
    words = [str(world / label) for label in ALIGNMENTS] + ["--base", str(world / "base"), "--method", "ties", *best]
    done = CliRunner().invoke(app, ["merge", *words, "--no-fsync", "--no-hashes", "--out", str(tmp_path / "by-hand")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "by-hand" / "merge.json").read_text())["search"] is None
