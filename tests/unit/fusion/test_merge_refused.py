"""Unlike parents and bad recipes are refused in one line, before a byte is written (rows 62, 63)."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.vocabulary import known_ids
from h3scale.cli.merge import merge as merge_verb
from h3scale.config.merge import OPTIONS, load_merge, named
from h3scale.errors import ConfigError, DataError, H3Error, MissingInputError, UnsafeError, UsageError
from h3scale.fusion.compatible import tokenizer_findings
from h3scale.merge.delta import dense
from h3scale.merge.registry import merged_delta
from h3scale.model.names import EMBEDDINGS
from tests.unit.fusion.merging import adapter, close, run, whole


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **values: Any) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | values)


NAME = "model.layers.1.mlp.up_proj.weight"


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["sort0"], vocab["sort1"] = vocab["sort1"], vocab["sort0"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


Tensors = dict[str, torch.Tensor]


def fewer_rows(name: str) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


def as_dtype(dtype: torch.dtype) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))


def without_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def one_more_layer(tensors: Tensors) -> None:
    tensors[NAME.replace("1", "2")] = tensors[NAME].clone()


UP = "mlp.up_proj.weight (layers 1)"
UNLIKE: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("shape", fewer_rows(NAME), [UP, "(47, 32)"]),
    ("vocabulary", fewer_rows(EMBEDDINGS[0]), [EMBEDDINGS[0], "(41, 32)"]),
    ("number format", as_dtype(torch.float16), [UP, "float16"]),
    ("quantised", as_dtype(torch.int8), [UP]),
    ("fewer layers", lambda folder: edit(folder, without_layer), ["misses", UP]),
    ("more layers", lambda folder: edit(folder, one_more_layer), ["mlp.up_proj.weight (layers 2)"]),
    ("tokenizer", other_tokenizer, ["tokenizer differs", "sort0"]),
    ("tied head", lambda folder: reconfigure(folder, tie_word_embeddings=True), ["tie_word_embeddings is True"]),
    ("family", lambda folder: reconfigure(folder, model_type="mistral"), ["model_type 'mistral'"]),
]


@pytest.mark.parametrize(("what", "change", "said"), UNLIKE, ids=[row[0] for row in UNLIKE])
def test_an_unlike_parent_is_refused_by_name_before_a_byte_is_written(
    family: Path, tmp_path: Path, what: str, change: Callable[[Path], Any], said: list[str]
) -> None:
    shutil.copytree(family / "honest", tmp_path / "odd")
    change(tmp_path / "odd")
    (tmp_path / "place").mkdir()
    with pytest.raises(DataError) as caught:
        run(family, tmp_path / "place" / "out", "ties", ["helpful", str(tmp_path / "odd")])
    [finding, *_] = [finding for finding in caught.value.findings if all(word in finding for word in said)]
    assert finding.startswith(str(tmp_path / "odd"))
    assert not any((tmp_path / "place").iterdir())


def pieces(folder: Path, words: str) -> None:
    """A SentencePiece model of these characters."""
    made = io.BytesIO()
    lines = iter([words] * 3)
    SentencePieceTrainer.Train(
        sentence_iterator=lines, model_writer=made, model_type="char", vocab_size=len(set(words)) + 4, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())


def ranks(folder: Path, words: str) -> None:
    """As tiktoken has them."""
    (folder / "tokenizer.model").write_text("".join(f"{word} {i}\n" for i, word in enumerate(words)))


def plain(folder: Path, words: str) -> None:
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})


@pytest.mark.parametrize("kind", [pieces, ranks, plain])
def test_tokenizers_of_any_kind_are_compared_where_the_base_has_none(
    family: Path, tmp_path: Path, kind: Callable[[Path, str], None]
) -> None:
    for label in ("base", "helpful", "honest"):
        shutil.copytree(family / label, tmp_path / label, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    kind(tmp_path / "helpful", "abc")
    kind(tmp_path / "honest", "abc")
    run(tmp_path, tmp_path / "out", "ties", ["helpful", "honest"])
    kind(tmp_path / "honest", "abd")
    with pytest.raises(DataError) as caught:
        run(tmp_path, tmp_path / "other", "ties", ["helpful", "honest"])
    [finding] = caught.value.findings
    assert finding.startswith(f"{tmp_path / 'honest'}: tokenizer differs from {tmp_path / 'helpful'}'s in ")
    assert not (tmp_path / "other").exists()


def test_the_same_tokens_in_files_of_two_kinds_are_one_tokenizer(tmp_path: Path) -> None:
    for label in ("one", "other", "added"):
        (tmp_path / label).mkdir()
    pieces(tmp_path / "one", "abc")
    found = known_ids(tmp_path / "one")
    assert found is not None
    added = {"</s>": found.of_token["</s>"]}
    tokens = {token: i for token, i in found.of_token.items() if token not in added}
    write_json(tmp_path / "other" / "tokenizer.json", {"model": {"vocab": found.of_token}})
    write_json(tmp_path / "added" / "vocab.json", tokens)
    assert tokenizer_findings(tmp_path / "one", [tmp_path / "other"]) == []
    [finding] = tokenizer_findings(tmp_path / "one", [tmp_path / "other", tmp_path / "added"])
    assert finding.startswith(f"{tmp_path / 'added'}: tokenizer differs from the base's in 1 tokens (such as '</s>')")
    write_json(tmp_path / "added" / "tokenizer_config.json", {"added_tokens_decoder": {str(added["</s>"]): {"content": "</s>"}}})
    assert tokenizer_findings(tmp_path / "one", [tmp_path / "other", tmp_path / "added"]) == []


def test_unlike_number_formats_merge_when_the_recipe_says_which_to_write(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "honest", tmp_path / "half")
    edit(tmp_path / "half", lambda tensors: tensors.update({name: values.half() for name, values in tensors.items()}))
    out = run(family, tmp_path / "out", "linear", ["helpful", str(tmp_path / "half")], dtype="float32")
    close(load_file(out / "model.safetensors"), whole(family, "linear", ["helpful", "honest"]), atol=1e-2)


@pytest.mark.parametrize("method", ["linear", "ties", "tsv_m", "dare"])
def test_values_that_are_not_finite_are_blamed_on_the_parent_that_has_them(family: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(family / "honest", tmp_path / "bad")
    edit(tmp_path / "bad", lambda tensors: tensors[NAME].__setitem__((3, 4), float("nan")))
    with pytest.raises(DataError) as caught:
        run(family, tmp_path / "out", method, ["helpful", str(tmp_path / "bad")])
    assert caught.value.findings == [f"{tmp_path / 'bad'}: {NAME} has values that are not finite (NaN or infinite)"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("method", ["linear", "tsv_m", "iso_c", "wudi", "resm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_blamed_on_their_adapter(family: Path, tmp_path: Path, method: str, value: float) -> None:
    bad = adapter(tmp_path / "bad", family / "base", seed=5)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = next(name for name in tensors if "down_proj.lora_A" in name)
    tensors[name][0, 0] = value
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(DataError) as caught:
        run(family, tmp_path / "out", method, ["helpful", str(bad)])
    [finding] = caught.value.findings
    assert finding.startswith(f"{bad}: model.layers.")
    assert finding.endswith("down_proj.weight has values that are not finite (NaN or infinite)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_values_that_the_number_format_cannot_hold_are_refused(family: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too large for the number format"):
        run(family, tmp_path / "out", "task_arithmetic", ["helpful", "honest"], scaling=1e7, dtype="float16")
    assert not any(tmp_path.iterdir())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"models": ["helpful"]}, "models: 1 given to ties (works: two or more)"),
    ({"models": []}, "models: 0 given to ties"),
    ({"models": ["helpful", "helpful"]}, "helpful is given twice"),
    ({"models": ["helpful", "base/../helpful"]}, "is given twice"),
    ({"weights": [1.0, -1.0]}, "their sum above 0"),
    ({"weights": [0.0, 0.0]}, "all are 0"),
    ({"weights": []}, "weights: 0 for 2 models"),
    ({"weights": [1.0, float("nan")]}, "finite number"),
    ({"weights": [1.0]}, "weights: 1 for 2 models (works: one each)"),
    ({"density": 0.0}, "density: 0.0: Input should be greater than 0"),
    ({"density": 1.1}, "density: 1.1: Input should be less than or equal to 1"),
    ({"densty": 0.5}, "densty: unknown key (did you mean 'density'?)"),
    ({"scaling": float("inf")}, "finite number"),
    ({"method": "tis"}, "method: 'tis' (works: linear, slerp,"),
    ({"method": "slerp", "models": ["helpful", "honest", "harmless"]}, "models: 3 given to slerp (works: two)"),
    ({"method": "slerp", "weights": [1.0, 1.0]}, "slerp has none"),
    ({"method": "della", "density": 0.9}, "window: 0.15 around density 0.9"),
    ({"dtype": "int8"}, "dtype: 'int8'"),
    ({"base": None}, "base: is required by ties"),
    ({"base": None, "method": "linear", "scaling": 0.5}, "base: is required by linear with scaling 0.5"),
    ({"base": None, "method": "slerp", "scaling": 2.0}, "base: is required by slerp with scaling 2"),
]


@pytest.mark.parametrize(("values", "said"), BAD, ids=[row[1][:30] for row in BAD])
def test_a_bad_recipe_is_refused_with_what_would_work(
    family: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(family)
    with pytest.raises(ConfigError) as caught:
        load_merge(None, {"base": "base", "method": "ties", "models": ["helpful", "honest"], "out": "out", **values}, [])
    assert said in str(caught.value), caught.value.findings
    assert all("\n" not in finding for finding in caught.value.findings)


AVERAGES = {"linear", "ties", "dare_ties", "della", "model_stock", "tsv_m", "iso_c", "iso_cts", "wudi", "resm"}


@pytest.mark.parametrize("method", [method for method in OPTIONS if method != "slerp"])
def test_weights_of_0_alone_are_refused_and_of_sum_0_where_a_mean_is_taken(method: str) -> None:
    """Row 63 of the catalogue."""
    values = {"base": "base", "method": method, "models": ["helpful", "honest"], "out": "out"}
    with pytest.raises(ConfigError, match=r"weights: .*\[0.0, 0.0\]: all are 0"):
        load_merge(None, values | {"weights": [0, 0]}, [])
    if method in AVERAGES:
        with pytest.raises(ConfigError, match="their sum above 0"):
            load_merge(None, values | {"weights": [1, -1]}, [])
    else:
        _, options = load_merge(None, values | {"weights": [1, -1]}, [])
        base_X, deltas = torch.zeros(4), [torch.tensor([3.0, -2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -3.0, 0.0])]
        assert dense(merged_delta(method, base_X, deltas, options)).isfinite().all()
    load_merge(None, values | {"weights": [1, 0]}, [])


def test_other_things_that_cannot_be_are_one_line(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    ties = {"base": "base", "method": "ties", "out": "out"}
    cases: list[tuple[type[H3Error], list[str], dict[str, Any], str]] = [
        (UsageError, [], {}, "no models"),
        (
            MissingInputError,
            ["helpful", "nowhere"],
            ties,
            "nowhere: no such model folder",
        ),
        (
            UnsafeError,
            ["helpful", "honest"],
            {**ties, "out": "honest", "force": True},
            "would replace models.honest",
        ),
        (UsageError, ["helpful", "honest"], {**ties, "device": "cuda:77"}, "--device"),
        (ConfigError, ["helpful", "honest", "density=[1"], ties, "not valid YAML"),
    ]
    for kind, words, options, said in cases:
        with pytest.raises(kind, match=said):
            merge_verb(words, **{"recipe": None, **_DEFAULTS, **options})
    assert not (family / "out").exists()


_DEFAULTS: dict[str, Any] = {
    **{"base": None, "method": None, "out": None, "dtype": None, "device": "cpu", "workers": 1, "max_shard_size": "5GB"},
    **{"hashes": True, "fsync": False, "force": False, "dry_run": False},
}


def test_words_with_an_equals_sign_are_options_and_the_rest_are_models(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family)
    options = {"base": "base", "method": "ties", "out": str(tmp_path / "out"), "recipe": None}
    merge_verb(["helpful", "honest", "density=0.5", "weights=[1, 2]"], **{**_DEFAULTS, **options, "dry_run": True})
    said = capsys.readouterr().out
    assert "honest: model honest, weight 2" in said
    assert "density 0.5" in said
    assert not (tmp_path / "out").exists()


def test_folders_are_named_by_as_much_of_their_paths_as_tells_them_apart() -> None:
    assert named(["m/helpful", "m/honest"]) == {"helpful": "m/helpful", "honest": "m/honest"}
    two = ["m/helpful/final", "m/honest/final"]
    assert named(two) == {"helpful/final": two[0], "honest/final": two[1]}
    assert named(two[::-1]) == named(two)
    assert named([]) == {}
