"""Models together: the mean of their logits, scored as one model."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from h3scale.cli.evaluate import evaluate
from h3scale.data.records import write_records
from h3scale.errors import DataError, UsageError
from h3scale.evaluation import ensemble
from h3scale.evaluation.ensemble import Ensemble, evaluate_ensemble
from h3scale.evaluation.journal import Journal
from h3scale.evaluation.run_suite import evaluate_suite
from h3scale.evaluation.suite import LoadedSuite, load_suite

from .conftest import THREE, make_dense, make_records, save


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("ensemble")
    for number in (1, 2):
        save(make_dense(tokenizer, number), tokenizer, folder / f"model-{number}")
    write_records(folder / "records.jsonl", make_records(THREE.alignments, 8))
    (folder / "suite.yaml").write_text(
        yaml.safe_dump({"name": "known", "tasks": {"known": {"kind": "nll", "file": "records.jsonl"}}})
    )
    return folder


@pytest.fixture(scope="module")
def loaded(place) -> LoadedSuite:
    return load_suite(place / "suite.yaml")


def test_the_mean_of_logits_is_the_scaled_product_of_the_probabilities() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    models = [
        type("Fixed", (torch.nn.Module,), {"forward": lambda self, x=x, **_: SimpleNamespace(logits=x), "config": None})()
        for x in logits
    ]
    found = Ensemble(models)().logits.softmax(-1)
    product = logits.softmax(-1).prod(0).sqrt()
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True))


def test_a_model_with_itself_is_that_model(place: Path, loaded: LoadedSuite) -> None:
    one = place / "model-1"
    twice, alone = evaluate_ensemble(loaded, [one, one]), evaluate_suite(loaded, {"one": one})["one"]
    for ours, theirs in zip(twice["items"]["known"], alone["items"]["known"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)


def test_the_verb_writes_one_result_and_two_models_are_neither(place: Path, loaded: LoadedSuite, tmp_path: Path) -> None:
    folders = [place / "model-1", place / "model-2"]
    out = tmp_path / "both.json"
    evaluate(folders, out, suite=str(place / "suite.yaml"), ensemble=True)
    both = json.loads(out.read_text())["suite"]
    alone = evaluate_suite(loaded, {folder.name: folder for folder in folders})
    for name in alone:
        assert both["scores"] != alone[name]["scores"]
        assert both["items"]["known"][0]["tokens"] == alone[name]["items"]["known"][0]["tokens"]


def test_an_interrupted_ensemble_goes_on_to_the_same_bits(place: Path, tmp_path: Path, monkeypatch) -> None:
    """More records than a unit; the second unit is interrupted, and is all that the same command scores."""
    write_records(tmp_path / "records.jsonl", make_records(THREE.alignments, 12))
    (tmp_path / "suite.yaml").write_text((place / "suite.yaml").read_text())
    folders, more = [place / "model-1", place / "model-2"], {"suite": str(tmp_path / "suite.yaml"), "ensemble": True}
    evaluate(folders, tmp_path / "whole.json", **more)
    scored, real = [], ensemble.score_unit

    def score_unit(model, unit, task):
        if scored:
            raise KeyboardInterrupt
        scored.append(unit.key)
        return real(model, unit, task)

    monkeypatch.setattr(ensemble, "score_unit", score_unit)
    out = tmp_path / "both.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, out, **more)
    assert len(Journal(tmp_path / "both.json.scored").read()) == 1
    again = []
    monkeypatch.setattr(ensemble, "score_unit", lambda model, unit, task: (again.append(unit.key), real(model, unit, task))[1])
    evaluate(folders, out, **more)
    assert len(again) == 1
    assert again != scored
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "both.json.scored").exists()


def test_what_is_remembered_is_of_these_models_in_this_order(place: Path, loaded: LoadedSuite, tmp_path: Path) -> None:
    one, two = place / "model-1", place / "model-2"
    both = evaluate_ensemble(loaded, [one, two], journal=tmp_path)
    alone = evaluate_suite(loaded, {"one": one}, journal=tmp_path)["one"]
    assert alone == evaluate_suite(loaded, {"one": one})["one"]
    assert evaluate_ensemble(loaded, [one, one], journal=tmp_path)["scores"] != both["scores"]
    assert len(Journal(tmp_path).read()) == 3


def test_what_cannot_be_added_up_is_refused(place: Path, loaded: LoadedSuite, tmp_path: Path, tokenizer) -> None:
    import shutil

    shutil.copytree(place / "model-2", tmp_path / "other")
    known = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = known["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match="its tokenizer is not that of"):
        evaluate_ensemble(loaded, [place / "model-1", tmp_path / "other"])
    suite = str(files("h3scale.data") / "records_builtin" / "suite.yaml")
    for models, out in (([place / "model-1"], "a.json"), ([place / "model-1", place / "model-2"], "folder")):
        with pytest.raises(UsageError, match="--ensemble: two models or more"):
            evaluate(models, tmp_path / out, suite=suite, ensemble=True)
