"""Merging folders: what the methods give on whole tensors, the same bytes whoever interrupts it."""

import shutil
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
from h3scale.config.fuse import FuseRecipe
from h3scale.config.merge import OPTIONS, load_merge
from h3scale.fusion.execute import fuse
from h3scale.fusion.merge import How, plan_merge
from h3scale.fusion.merged import Budget, Merger
from h3scale.merge.delta import Site, dense
from h3scale.merge.registry import METHODS, merged_delta
from tests.tiny import DENSE_FAMILIES, tiny_aligned, tiny_dense, tiny_llama, tiny_tokenizer
from tests.unit.fusion.merging import LABELS, TARGETS, close, models_for, run, whole


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


def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The merge is stopped at the ninth tensor, once; gives the names of all that are begun."""
    made: list[str] = []
    source = Merger.made

    def stopping(self: Merger, name: str) -> Any:
        made.append(name)
        if len(made) == 9:
            raise KeyboardInterrupt
        return source(self, name)

    monkeypatch.setattr(Merger, "made", stopping)
    return made


@pytest.mark.parametrize("method", ["ties", "resm"])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    how = How(workers=1, max_shard_bytes=20_000, fsync=False)
    wanted = run(place, tmp_path / "wanted", method, list(LABELS), how)
    made = interrupted(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "out", method, list(LABELS), how)
    assert not (tmp_path / "out").exists()
    first = len(made)
    out = run(place, tmp_path / "out", method, list(LABELS), how)
    assert 0 < len(made) - first < len(ModelFolder(wanted).specs)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in wanted.iterdir()}


def test_other_options_begin_anew(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = How(workers=1, max_shard_bytes=20_000, fsync=False)
    interrupted(monkeypatch)
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


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {key: value for key, value in settings.items() if key != "chat_template"})


@pytest.mark.parametrize("verb", ["merge", "fuse"])
@pytest.mark.parametrize("told", [True, False], ids=["told by it", "told by the base alone"])
def test_how_an_answer_ends_is_taken_from_where_the_tokenizer_is(family: Path, tmp_path: Path, verb: str, told: bool) -> None:
    """A base that cannot converse ends at another token than the model that has learned to."""
    for name in ("base", "helpful", "honest"):
        shutil.copytree(family / name, tmp_path / name)
        without_template(tmp_path / name)
        write_json(tmp_path / name / "generation_config.json", {"eos_token_id": 3})
    tiny_tokenizer(tmp_path / "honest")
    learned = {"eos_token_id": [3, 5]}
    if told:
        write_json(tmp_path / "honest" / "generation_config.json", learned)
    else:
        (tmp_path / "honest" / "generation_config.json").unlink()
    if verb == "merge":
        run(tmp_path, tmp_path / "out", "linear", ["helpful", "honest"])
    else:
        recipe = {"base": str(tmp_path / "base"), "models": {label: str(tmp_path / label) for label in ("helpful", "honest")}}
        fuse(FuseRecipe.model_validate(recipe | {"router": {"init": "random"}, "out": str(tmp_path / "out")}))
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    wanted = learned if told else read_json(tmp_path / "base" / "generation_config.json")
    assert read_json(tmp_path / "out" / "generation_config.json") == wanted


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


def test_the_model_card_of_a_fused_model_says_how_what_is_no_expert_was_merged(family: Path, tmp_path: Path) -> None:
    models = {"helpful": str(family / "helpful"), "honest": str(family / "lora-honest")}
    recipe = {"base": str(family / "base"), "models": models, "router": {"init": "random"}, "out": str(tmp_path / "out")}
    fuse(FuseRecipe.model_validate(recipe | {"shared": "resm", "merge": {"outlier_kappa": 2.5, "weights": [1.0, 0.5]}}))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # as training does, whose folder has no fuse_report.json
    trained.save_pretrained(tmp_path / "trained")
    for name in ("out", "trained"):
        release(tmp_path / name, tmp_path / "release" / name, license="apache-2.0")
        card = (tmp_path / "release" / name / "README.md").read_text()
        assert "RESM (reconstruction) ([arXiv:2502.06876]" in card
        assert "outlier_kappa 2.5" in card
        assert {"| helpful | model | 1.0 |", "| honest | adapter | 0.5 |"} < set(card.splitlines())
        assert str(tmp_path) not in card
        assert str(family) not in card


@pytest.mark.parametrize("shared", ["base", "average"])
def test_the_model_card_of_other_fused_models_claims_no_merge(family: Path, tmp_path: Path, shared: str) -> None:
    models = {label: str(family / label) for label in LABELS}
    recipe = {"base": str(family / "base"), "models": models, "router": {"init": "random"}, "out": str(tmp_path / "out")}
    fuse(FuseRecipe.model_validate(recipe | {"shared": shared}))
    release(tmp_path / "out", tmp_path / "release", license="apache-2.0")
    assert "## Merge" not in (tmp_path / "release" / "README.md").read_text()


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
