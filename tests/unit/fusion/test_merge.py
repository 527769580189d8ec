"""Merging folders: what the methods give on whole tensors, the same bytes whoever interrupts it; unlike parents are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from h3scale.checkpoint.receipt import check_receipt, sha256
from h3scale.checkpoint.release import release
from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.checkpoint.verify import verify
from h3scale.cli.merge import merge as merge_verb
from h3scale.config.fuse import FuseRecipe
from h3scale.config.merge import OPTIONS, load_merge, named
from h3scale.errors import ConfigError, DataError, H3Error, MissingInputError, UnsafeError, UsageError
from h3scale.fusion.execute import fuse
from h3scale.fusion.merge import How, merge, plan_merge
from h3scale.fusion.merged import Budget, Merger
from h3scale.merge.delta import Site, dense
from h3scale.merge.registry import METHODS, merged_delta
from h3scale.model.names import EMBEDDINGS
from tests.tiny import DENSE_FAMILIES, tiny_aligned, tiny_dense, tiny_llama

LABELS = ("helpful", "harmless", "honest")
RANK = 2
TARGETS = ("self_attn.q_proj", "mlp.down_proj")


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA adapter as PEFT writes it, on two projections of every layer; alpha / r is 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in ModelFolder(base).specs.items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, spec.shape[1], generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(spec.shape[0], RANK, generator=generator)
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"})
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three aligned models, three adapters."""
    place = tmp_path_factory.mktemp("family")
    base = tiny_llama(place / "base")
    for i, label in enumerate(LABELS):
        tiny_aligned(place / label, base, seed=i + 1, ffn_only=False)
        adapter(place / f"lora-{label}", base, seed=i + 1)
    return place


@pytest.fixture
def place(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work goes in blocks of some rows, as in large models."""
    monkeypatch.setattr("h3scale.fusion.parents.BLOCK_VALUES", 300)
    return family


def run(place: Path, out: Path, method: str, models: list[str], how: How | None = None, **values: Any) -> Path:
    base = values.pop("base", "base")
    given = {"models": [str(place / name) for name in models], "method": method, "out": str(out), **values}
    given |= {"base": str(place / base)} if base else {}
    merge(*load_merge(None, given, []), how=how or How(workers=2, fsync=False))
    return out


def models_for(method: str, prefix: str = "") -> list[str]:
    return [f"{prefix}{label}" for label in LABELS[: 2 if method == "slerp" else 3]]


def whole(place: Path, method: str, models: list[str], **values: Any) -> dict[str, torch.Tensor]:
    """Every tensor merged by itself, in memory, from all that is in the files."""
    base, options = load_file(place / "base" / "model.safetensors"), OPTIONS[method](**values)
    parents = [load_file(place / model / "model.safetensors") for model in models]
    return {
        name: values
        + dense(
            merged_delta(
                method,
                values,
                [parent[name] - values for parent in parents],
                options,
                Site(name, tuple(models)),
                is_embedding=name in EMBEDDINGS,
            )
        )
        for name, values in base.items()
    }


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("method", OPTIONS)
def test_a_merged_folder_is_what_the_method_gives_on_whole_tensors(place: Path, tmp_path: Path, method: str) -> None:
    models = models_for(method)
    out = run(place, tmp_path / "out", method, models)
    found, wanted = load_file(out / "model.safetensors"), whole(place, method, models)
    close(found, wanted)
    changed = [name for name in wanted if not torch.equal(found[name], load_file(place / "base" / "model.safetensors")[name])]
    assert changed or method == "model_stock"  # independent changes have no angle in common
    assert check_receipt(out / "receipt.json") == (len(wanted), [])


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_are_the_same_with_any_number_of_threads(place: Path, tmp_path: Path, method: str) -> None:
    folders = [run(place, tmp_path / f"{n}", method, models_for(method), How(workers=n, fsync=False)) for n in (1, 3)]
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == other


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "tsv_m", "iso_c", "wudi", "resm"])
def test_adapters_merge_as_the_models_they_make(place: Path, tmp_path: Path, method: str) -> None:
    made = tmp_path / "made"
    base = load_file(place / "base" / "model.safetensors")
    for label in LABELS:
        shutil.copytree(place / "base", made / f"lora-{label}")
        parts = load_file(place / f"lora-{label}" / "adapter_model.safetensors")
        for name in base:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in parts:
                change = parts[f"{module}.lora_B.weight"].double() @ parts[f"{module}.lora_A.weight"].double()
                base_values = base[name].double() + 2 * change
                _replace(made / f"lora-{label}", name, base_values)
    out = run(place, tmp_path / "out", method, models_for(method, "lora-"))
    found = load_file(out / "model.safetensors")
    wanted = _double_whole(place, made, method, models_for(method, "lora-"))
    close(found, {name: values.float() for name, values in wanted.items()}, atol=2e-4)
    left = [name for name in base if not any(target in name for target in TARGETS)]
    assert left
    assert all(torch.equal(found[name], base[name]) for name in left)


def _replace(folder: Path, name: str, values: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _double_whole(place: Path, made: Path, method: str, models: list[str]) -> dict[str, torch.Tensor]:
    base = load_file(place / "base" / "model.safetensors")
    parents = [load_file(made / model / "model.safetensors") for model in models]
    merged = {}
    for name, values in base.items():
        deltas = [parent[name].double() - values.double() for parent in parents]
        if method == "ties":  # thresholds are those of fp32
            deltas = [delta.float() for delta in deltas]
        site = Site(name, tuple(models))
        merged[name] = values.double() + dense(merged_delta(method, values.double(), deltas, OPTIONS[method](), site)).double()
    return merged


def test_the_thresholds_of_a_whole_model_are_those_of_its_values_laid_flat(place: Path, tmp_path: Path) -> None:
    found = load_file(run(place, tmp_path / "out", "ties", list(LABELS), scope="model", density=0.1) / "model.safetensors")
    base = load_file(place / "base" / "model.safetensors")
    parents = [load_file(place / label / "model.safetensors") for label in LABELS]
    flat = [torch.cat([(parent[name] - base[name]).flatten() for name in base]) for parent in parents]
    wanted = dense(merged_delta("ties", torch.zeros_like(flat[0]), flat, OPTIONS["ties"](density=0.1)))
    merged, start = (torch.cat([model[name].flatten() for name in base]) for model in (found, base))
    torch.testing.assert_close(merged, start + wanted)
    close_to = load_file(run(place, tmp_path / "by-tensor", "ties", list(LABELS), density=0.1) / "model.safetensors")
    assert any(not torch.equal(found[name], close_to[name]) for name in base)


def test_the_number_format_is_the_one_asked_for(place: Path, tmp_path: Path) -> None:
    full = load_file(run(place, tmp_path / "full", "linear", list(LABELS)) / "model.safetensors")
    out = run(place, tmp_path / "half", "linear", list(LABELS), dtype="bfloat16")
    half = load_file(out / "model.safetensors")
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert read_json(out / "config.json")["dtype"] == "bfloat16"


def test_scale_zero_gives_the_bytes_of_the_base(place: Path, tmp_path: Path) -> None:
    out = run(place, tmp_path / "out", "ties", list(LABELS), scaling=0)
    base = load_file(place / "base" / "model.safetensors")
    assert all(torch.equal(values, base[name]) for name, values in load_file(out / "model.safetensors").items())


def test_without_a_base_the_first_model_takes_its_place(place: Path, tmp_path: Path) -> None:
    found = load_file(run(place, tmp_path / "out", "linear", list(LABELS), base=None) / "model.safetensors")
    parents = [load_file(place / label / "model.safetensors") for label in LABELS]
    close(found, {name: torch.stack([parent[name] for parent in parents]).mean(0) for name in found}, atol=1e-6)


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_every_family_merges_into_a_model_that_transformers_loads(tmp_path: Path, kind: str, sizes: dict[str, Any]) -> None:
    base = tiny_dense(kind, tmp_path / "base", **sizes)
    for seed in (1, 2):
        tiny_aligned(tmp_path / f"m{seed}", base, seed)
    out = run(tmp_path, tmp_path / "out", "tsv_m", ["m1", "m2"])
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == kind
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[4, 9, 30]])).logits.isfinite().all()
    verify(out)


def test_shards_have_an_index_and_hold_the_same_model(place: Path, tmp_path: Path) -> None:
    one = load_file(run(place, tmp_path / "one", "ties", list(LABELS)) / "model.safetensors")
    out = run(place, tmp_path / "many", "ties", list(LABELS), How(max_shard_bytes=20_000, fsync=False))
    assert len(list(out.glob("*.safetensors"))) > 2
    assert all(torch.equal(ModelFolder(out).tensor(name), one[name]) for name in one)


# ---------------------------------------------------------------- interrupted, and within memory


@pytest.mark.parametrize("method", ["ties", "resm"])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    how = How(workers=1, max_shard_bytes=20_000, fsync=False)
    wanted = run(place, tmp_path / "wanted", method, list(LABELS), how)
    made: list[str] = []
    source = Merger.made

    def stopping(self: Merger, name: str) -> Any:
        made.append(name)
        if len(made) == 9:
            raise KeyboardInterrupt
        return source(self, name)

    monkeypatch.setattr(Merger, "made", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", method, list(LABELS), how)
    assert not (tmp_path / "out").exists()
    first = len(made)
    out = run(place, tmp_path / "out", method, list(LABELS), how)
    assert 0 < len(made) - first < len(ModelFolder(wanted).specs)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in wanted.iterdir()}


def test_other_options_begin_anew(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = How(workers=1, max_shard_bytes=20_000, fsync=False)
    source, made = Merger.made, []

    def stopping(self: Merger, name: str) -> Any:
        made.append(name)
        if len(made) == 9:
            raise KeyboardInterrupt
        return source(self, name)

    monkeypatch.setattr(Merger, "made", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", "ties", list(LABELS), how)
    found = run(place, tmp_path / "out", "ties", list(LABELS), how, density=0.5)
    wanted = whole(place, "ties", list(LABELS), density=0.5)
    close({name: ModelFolder(found).tensor(name) for name in wanted}, wanted)


def test_threads_wait_for_room_and_the_largest_goes_alone() -> None:
    import threading

    budget, held = Budget(10), []

    def work(num_bytes: int) -> None:
        with budget.hold(num_bytes):
            held.append(budget.held)

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 4, 4, 30, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(held) == 5
    assert all(size <= 10 or size == 30 for size in held)
    assert budget.held == 0


# ---------------------------------------------------------------- provenance


def test_what_was_merged_is_written_down(place: Path, tmp_path: Path) -> None:
    out = run(place, tmp_path / "out", "resm", ["helpful", "lora-honest"], weights=[1.0, 0.5], outlier_kappa=2.5)
    told = read_json(out / "merge.json")
    assert (told["method"], told["title"], told["paper"]) == ("resm", "RESM (reconstruction)", "2502.06876")
    assert told["options"]["outlier_kappa"] == 2.5
    assert [(label, each["kind"], each["weight"]) for label, each in told["models"].items()] == [
        ("helpful", "model", 1.0),
        ("lora-honest", "adapter", 0.5),
    ]
    assert told["base"]["files"]["model.safetensors"] == sha256(place / "base" / "model.safetensors")
    files = told["models"]["lora-honest"]["files"]
    assert files == {name: sha256(place / "lora-honest" / name) for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_the_model_card_says_how_it_was_merged(place: Path, tmp_path: Path) -> None:
    out = run(place, tmp_path / "out", "resm", list(LABELS))
    release(out, tmp_path / "release", license="apache-2.0")
    card = (tmp_path / "release" / "README.md").read_text()
    assert "RESM (reconstruction)" in card
    assert "outlier_kappa 3.0" in card
    assert f"`{sha256(place / 'honest' / 'model.safetensors')}`" in card
    assert "- merge" in card
    assert str(place) not in card


def test_folders_without_a_tokenizer_merge_with_a_note(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False)
    for seed in (1, 2):
        tiny_aligned(tmp_path / f"m{seed}", base, seed)
        for path in (tmp_path / f"m{seed}").glob("*token*"):
            path.unlink()
        (tmp_path / f"m{seed}" / "chat_template.jinja").unlink(missing_ok=True)
    models = [str(tmp_path / "m1"), str(tmp_path / "m2")]
    values = {"models": models, "base": str(base), "method": "linear", "out": str(tmp_path / "out")}
    [note] = plan_merge(*load_merge(None, values, [])).warnings
    assert "have no tokenizer" in note
    run(tmp_path, tmp_path / "out", "linear", ["m1", "m2"])
    assert not (tmp_path / "out" / "tokenizer.json").exists()


# ---------------------------------------------------------------- unlike parents (row 62), bad recipes (row 63)


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
    ({"weights": [0.0, 0.0]}, "their sum above 0"),
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


# ---------------------------------------------------------------- fuse with a method for what is no expert


@pytest.mark.parametrize("method", ["resm", "ties"])
def test_fuse_merges_what_is_no_expert_by_a_method(place: Path, tmp_path: Path, method: str) -> None:
    values = {"outlier_kappa": 2.0} if method == "resm" else {"density": 0.4}
    recipe = {
        **{"base": str(place / "base"), "models": {label: str(place / label) for label in LABELS}, "out": str(tmp_path / "out")},
        **{"router": {"init": "random"}, "shared": method, "merge": values},
    }
    fuse(FuseRecipe.model_validate(recipe))
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), whole(place, method, list(LABELS), **values)
    shared = [name for name in wanted if ".mlp." not in name]
    assert shared
    for name in shared:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)
    assert read_json(tmp_path / "out" / "fuse_report.json")["shared"]["method"] == method


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shared": "resn"}, "shared: 'resn' (works: base, average, linear,"),
        ({"shared": "base", "merge": {"density": 0.5}}, "merge: is for a method"),
        ({"shared": "ties", "merge": {"density": 2.0}}, "merge.density: Input should be less"),
        ({"shared": "ties", "merge": {"weights": [1.0]}}, "merge.weights: 1 for 3 models"),
        ({"shared": "slerp"}, "slerp takes two models"),
    ],
)
def test_a_shared_method_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    recipe = {"base": "b", "models": dict.fromkeys(LABELS, "m"), "out": "o", "router": {"init": "random"}}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (pydantic's own)
        FuseRecipe.model_validate(recipe | values)
    assert said in str(caught.value)
