"""evaluate, generate and report as a user meets them: files, tables, one clear line when something is wrong."""

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from h3scale.cli.evaluate import evaluate
from h3scale.cli.generate import generate
from h3scale.cli.report import report
from h3scale.data.records import write_records
from h3scale.errors import DataError, H3Error, MissingInputError, OutputError, UsageError
from h3scale.evaluation.evaluate import open_model
from h3scale.log import logger
from h3scale.model.expert_compute import registry

from .conftest import THREE, make_dense, make_records, save, save_models
from .fake import fake_out


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = save_models(tokenizer, tmp_path_factory.mktemp("verbs"))
    write_records(folder / "heldout.jsonl", make_records(THREE.alignments))
    write_records(folder / "train.jsonl", make_records(THREE.alignments, seed=1))
    return folder


def run(verb, *words):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verb)
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    if isinstance(result.exception, H3Error):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_one_model_gives_one_file(place, tmp_path):
    out = tmp_path / "deep" / "fused.json"
    text = run(evaluate, place / "fused", "--records", place / "heldout.jsonl", "--out", out, "--generate", 2,
               "--exclude-source", "template", "--bag-train", place / "train.jsonl")  # fmt: skip
    value = json.loads(out.read_text())
    assert set(value) == {"nll", "router", "without", "exact_match", "samples", "records", "notes", "bag"}
    assert set(value["nll"]["helpful"]) == {"nll", "low", "high", "records", "tokens"}
    assert value["nll"]["helpful"]["records"] == 6
    assert value["without"]["template"]["nll"]["helpful"]["records"] == 4
    assert set(value["without"]["template"]["router"]) == set(value["router"])
    assert set(value["records"][0]) == {"id", "alignment", "nll", "tokens", "group"}
    totals = [sum(r[key] for r in value["records"] if r["alignment"] == "honest") for key in ("nll", "tokens")]
    assert value["nll"]["honest"]["nll"] == pytest.approx(totals[0] / totals[1])
    assert str(place) not in out.read_text()
    assert f"{value['nll']['honest']['nll']:.3f}" in text
    assert text.splitlines()[-1].startswith(f"results: {out}   next: h3scale generate")


def test_several_models_give_a_folder_and_paired_differences(place, tmp_path):
    text = run(evaluate, place / "base", place / "other", place / "fused", "--records", place / "heldout.jsonl",
               "--out", tmp_path / "evaluation")  # fmt: skip
    values = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "evaluation").iterdir()}
    assert set(values) == {"base", "other", "fused"}
    assert "router" not in values["base"]
    assert set(values["fused"]["paired"]) == {"base", "other"}
    means = {name: sum(e["nll"] for e in value["nll"].values()) / 3 for name, value in values.items()}
    assert values["fused"]["paired"]["base"]["mean"] == pytest.approx(means["fused"] - means["base"])
    assert f"fused minus base, mean NLL: {means['fused'] - means['base']:+.4f}" in text
    run(evaluate, place / "base", "--records", place / "heldout.jsonl", "--out", tmp_path / "base.json")
    assert json.loads((tmp_path / "base.json").read_text()) == values["base"]


def test_wrong_words_are_one_clear_line_each(place, tmp_path):
    records = ("--records", place / "heldout.jsonl")
    cases = [
        (UsageError, "several models need a folder", (place / "base", place / "fused", *records, "--out", tmp_path / "x.json")),
        (UsageError, "one model needs a file", (place / "base", *records, "--out", tmp_path / "x")),
        (UsageError, "folder name 'base'", (place / "base", place / "base", *records, "--out", tmp_path / "x")),
        (UsageError, "none of trained", (place / "base", *records, "--out", tmp_path / "x.json", "--router", "best")),
        (UsageError, "is dense", (place / "base", *records, "--out", tmp_path / "x.json", "--router", "uniform")),
        (MissingInputError, "no such model folder", (place / "no", *records, "--out", tmp_path / "x.json")),
        (MissingInputError, "no such file", (place / "base", "--records", place / "no.jsonl", "--out", tmp_path / "x.json")),
        (OutputError, "exists already", (place / "base", *records, "--out", place / "train.jsonl.json")),
    ]
    (place / "train.jsonl.json").write_text("{}")
    for error, message, words in cases:
        with pytest.raises(error, match=message):
            run(evaluate, *words)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_tokenizer_that_does_not_fit_is_refused(place, tmp_path, tokenizer):
    small = tmp_path / "small"
    save(make_dense(tokenizer, vocab_size=12), tokenizer, small)
    with pytest.raises(DataError, match="21 tokens, the model embeds 12: they do not belong together"):
        run(evaluate, small, "--records", place / "heldout.jsonl", "--out", tmp_path / "x.json")
    shutil.rmtree(small)


def test_uniform_and_oracle_are_measured_and_named(place, tmp_path):
    for mode in ("uniform", "oracle"):
        run(evaluate, place / "fused", "--records", place / "heldout.jsonl", "--out", tmp_path / f"{mode}.json",
            "--router", mode, "--generate", 1)  # fmt: skip
    values = [json.loads((tmp_path / f"{mode}.json").read_text()) for mode in ("uniform", "oracle")]
    assert [value["router"]["mode"] for value in values] == ["uniform", "oracle"]
    assert values[0]["nll"] != values[1]["nll"]
    assert all(sample["experts"] == [] for value in values for sample in value["samples"])


def test_generate_shows_answer_and_experts(place):
    text = run(generate, place / "fused", "cat dog moon", "--max-new-tokens", 5)
    assert all(f"{name} " in text for name in THREE.names())
    assert "of the weight" in text
    dense = run(generate, place / "base", "cat dog moon", "--max-new-tokens", 5)
    assert "of the weight" not in dense
    assert dense.strip()
    with pytest.raises(UsageError, match="is empty"):
        run(generate, place / "base", " ")


@pytest.fixture
def computed(monkeypatch):
    """The names of the backends that computed experts."""
    names = []

    def noted(name, make):
        return lambda: lambda *arguments: (names.append(name), make()(*arguments))[1]

    backends = {name: noted(name, make) for name, make in registry._BACKENDS.items()}
    monkeypatch.setattr(registry, "_BACKENDS", backends)
    return names


@pytest.mark.parametrize("experts", ["loop", "grouped_mm"])
def test_what_experts_says_computes_them(place, tmp_path, computed, experts):
    run(evaluate, place / "fused", "--records", place / "heldout.jsonl", "--out", tmp_path / "fused.json", "--experts", experts)
    assert set(computed) == {experts}
    computed.clear()
    run(generate, place / "fused", "cat dog moon", "--max-new-tokens", 2, "--experts", experts)
    assert set(computed) == {experts}


def test_report_writes_a_page_from_results_alone(tmp_path):
    out = fake_out(tmp_path / "out", steps=5)
    (out / "evaluation" / "fused.json").unlink()
    assert f"report: {out / 'report.html'}" in run(report, out)


@pytest.mark.parametrize("verb", [evaluate, generate, report])
def test_help_has_an_example(verb):
    assert f"Example: h3scale {verb.__name__}" in " ".join(run(verb, "--help").split())


@pytest.mark.parametrize(("free", "moved"), [(1 << 40, ["cuda:0"]), (1 << 10, [])], ids=["room on the GPU", "no room on the GPU"])
def test_a_model_that_does_not_fit_the_gpu_is_scored_on_the_cpu(place, monkeypatch, caplog, free, moved):
    """On a machine that seems to have a GPU."""
    found = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (free, free))
    monkeypatch.setattr("torch.nn.Module.to", lambda self, where: found.append(str(where)) or self)
    monkeypatch.setattr(logger, "propagate", True)
    open_model(place / "fused")
    assert found == moved
    assert ("are computed on the CPU" in caplog.text) == (not moved)
