"""Models together: the mean of their logits, scored as one model."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from h3scale.cli.evaluate import evaluate
from h3scale.errors import DataError, UsageError
from h3scale.evaluation.ensemble import Ensemble, evaluate_ensemble
from h3scale.evaluation.run_suite import evaluate_suite
from h3scale.evaluation.suite import LoadedSuite, load_suite

from .conftest import THREE, make_dense, make_records, save


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    from h3scale.data.records import write_records

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
