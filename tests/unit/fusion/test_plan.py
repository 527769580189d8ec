"""The plan as it is printed, and bad input: one clear line a finding, the right exit code, nothing half-written."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.cli.fuse import fuse as fuse_verb
from h3scale.config.base import load_recipe
from h3scale.config.fuse import FuseRecipe
from h3scale.errors import ConfigError, DataError, H3Error, MissingInputError, OutputError, UnsafeError
from h3scale.fusion.compatible import fold, ranges
from h3scale.fusion.execute import plan_fusion
from h3scale.fusion.sources import AdapterSource
from tests.tiny import WORDS, tiny_aligned, tiny_llama, tiny_records, tiny_tokenizer

LABELS = ("helpful", "harmless", "honest")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a base, three aligned models, records and a recipe; it is the current one."""
    base = tiny_llama(tmp_path / "base")
    for i, label in enumerate(LABELS):
        tiny_aligned(tmp_path / label, base, seed=i + 1)
    tiny_records(tmp_path / "records.jsonl", LABELS)
    recipe = {"base": "base", "models": {label: label for label in LABELS}, "out": "out", "router": {"records": ["records.jsonl"]}}
    (tmp_path / "fuse.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*overrides):
    return plan_fusion(load_recipe(FuseRecipe, "fuse.yaml", list(overrides)))


def refused(kind: type[H3Error], place, *overrides, force=False) -> list[str]:
    """Runs the verb, which must refuse; the findings. Nothing may have been added to the folder."""
    before = sorted(path for path in place.rglob("*"))
    with pytest.raises(kind) as caught:
        fuse_verb("fuse.yaml", list(overrides), force=force, dry_run=False)
    assert type(caught.value) is kind
    assert sorted(path for path in place.rglob("*")) == before
    assert all("\n" not in finding for finding in caught.value.findings)
    return caught.value.findings


def rewrite(folder, **changes):
    """Replaces tensors of a folder; None takes one away. Double underscores stand for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, values in changes.items():
        name = name.replace("__", ".")
        if values is None:
            del tensors[name]
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- the plan as it is printed


def test_equal_layers_are_one_line_and_the_line_says_what_happens(place):
    lines = plan().text().splitlines()
    assert lines[:3] == ["base: model base", "helpful: model helpful", "harmless: model harmless"]
    [line] = [line for line in lines if "experts.2.w2.weight" in line]
    assert line.split() == [
        "model.layers.*.block_sparse_moe.experts.2.w2.weight",
        "0-1",
        "32",
        "x",
        "48",
        "float32",
        "honest",
        "expert",
    ]
    [line] = [line for line in lines if "experts.3.w1.weight" in line]
    assert line.split()[-2:] == ["base", "expert"]
    [line] = [line for line in lines if "embed_tokens" in line]
    assert line.split()[-2:] == ["base", "copy"]
    assert "each token goes to 2 of the experts 0 = helpful, 1 = harmless, 2 = honest, 3 = general" in lines[-2]
    assert lines[-1] == "4 experts can be trained with ep_size 1, 2, 4"


def test_copies_have_names_and_the_plan_says_how_experts_can_be_spread(place):
    made = plan("experts_per_alignment=2", "general_experts=2")
    assert made.expert_map.names() == [*(f"{label}{copy}" for label in LABELS for copy in ("", " 2")), "general", "general 2"]
    sources = [row.sources for row in made.rows() if row.tensor.endswith("w1.weight")]
    assert sources == [label for label in (*LABELS, "base") for _ in range(2)]
    assert "0 = helpful, 1 = helpful 2, 2 = harmless, 3 = harmless 2," in made.text()
    assert made.text().splitlines()[-1] == "8 experts can be trained with ep_size 1, 2, 4, 8"
    odd = plan("experts_per_alignment=2").text().splitlines()[-1]
    assert odd == "7 experts can be trained with ep_size 1, 7 (general_experts: 2 makes 8 of them: 1, 2, 4, 8)"


def test_a_plan_covers_every_tensor_once_and_the_routers_last(place):
    made = plan()
    assert len(made.by_name) == len(made.tensors) == 3 + 2 * (6 + 3 * 4 + 1)
    assert [planned.action for planned in made.tensors[-2:]] == ["router", "router"]
    assert sum(row.layers == "0-1" for row in made.rows()) == 6 + 3 * 4 + 1
    fused = sum(p.numel() for p in load_file("base/model.safetensors").values()) + 3 * 2 * 3 * 32 * 48 + 2 * 4 * 32
    assert made.num_parameters == fused


def test_average_names_its_sources(place):
    [row] = [row for row in plan("shared=average").rows() if row.tensor.endswith("q_proj.weight")]
    assert (row.sources, row.action) == ("helpful, harmless, honest", "average")


def test_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    fuse_verb("fuse.yaml", [], force=False, dry_run=True)
    assert "block_sparse_moe.experts.0.w1.weight" in capsys.readouterr().out
    assert sorted(place.rglob("*")) == before


def test_the_verb_writes_the_model_and_says_where_and_what_next(place, capsys):
    fuse_verb("fuse.yaml", ["top_k=1"], force=False, dry_run=False)
    printed = capsys.readouterr().out
    assert "router accuracy before training" in printed
    assert printed.splitlines()[-1].startswith("fused model: out   next: h3scale evaluate out")
    assert ModelFolder("out").config["num_experts_per_tok"] == 1
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_force_replaces_the_output(place):
    (place / "out").mkdir()
    (place / "out" / "old").write_text("old")
    fuse_verb("fuse.yaml", [], force=True, dry_run=False)
    assert not (place / "out" / "old").exists()
    assert (place / "out" / "config.json").is_file()


def test_layers_are_folded_into_ranges():
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2, 5, 8-9"
    assert fold(["model.layers.0.a", "model.norm", "model.layers.1.a"]) == {"model.layers.*.a": "0-1", "model.norm": ""}


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("genral_experts=1", "fuse.yaml: genral_experts: unknown key (did you mean 'general_experts'?)"),
        ("router.int=ridge", "router.int: unknown key (did you mean 'init'?)"),
        ("top_k=5", "top_k: 5 of 4 experts (works: 1 to 4)"),
        ("top_k=0", "top_k: 0"),
        ("experts_per_alignment=0", "experts_per_alignment: 0"),
        ("router.copy_noise=0", "router.copy_noise: 0"),
        ("models={helpful: helpful}", "models: 1 given (works: two or more"),
        ("router.records=[]", "init: ridge needs records"),
        ("router.init=best", "router.init: 'best'"),
        ("shared=both", "shared: 'both'"),
    ],
)
def test_a_wrong_recipe_is_78(place, override, said):
    findings = refused(ConfigError, place, override)
    assert ConfigError.exit_code == 78
    assert said in findings[0]


def test_the_order_of_models_in_the_recipe_is_the_label_order(place):
    assert plan("models={b: honest, a: helpful}").expert_map.alignments == ("b", "a")


# ---------------------------------------------------------------- folders


def test_missing_folders_are_66_and_all_named(place):
    findings = refused(MissingInputError, place, "models.helpful=nowhere", "models.honest=none")
    assert findings == ["nowhere: no such model folder", "none: no such model folder"]
    assert refused(MissingInputError, place, "base=nowhere") == ["nowhere: no such model folder"]
    (place / "helpful" / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(MissingInputError, place)[0]
    assert MissingInputError.exit_code == 66


def test_an_output_that_exists_is_73_before_anything_is_read(place):
    (place / "out").mkdir()
    (place / "out" / "kept").write_text("kept")
    findings = refused(OutputError, place, "base=nowhere")
    assert findings[0].startswith("out: exists already")
    assert OutputError.exit_code == 73


@pytest.mark.parametrize("out", ["base", "helpful", ".", "../{name}"])
def test_an_output_that_would_replace_an_input_is_77_even_with_force(place, out):
    findings = refused(UnsafeError, place, f"out={out.format(name=place.name)}", force=True)
    assert UnsafeError.exit_code == 77
    assert "would replace" in findings[0]


def test_an_alignment_without_records_is_65(place):
    tiny_records(place / "records.jsonl", LABELS[:2])
    assert refused(DataError, place) == ["records.jsonl: alignment 'honest' has no records"]


def test_a_router_start_without_a_tokenizer_is_66(place):
    for folder in ("base", *LABELS):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (place / folder / name).unlink(missing_ok=True)
    assert "no tokenizer" in refused(MissingInputError, place)[0]
    assert plan("router.init=random", "router.records=[]").tokenizer is None


def test_a_chat_template_that_only_an_aligned_model_has_is_taken_from_there(place):
    assert plan().tokenizer.name == "base"
    (place / "base" / "chat_template.jinja").unlink()
    assert plan().tokenizer.name == "helpful"


# ---------------------------------------------------------------- models that do not fit


def test_all_findings_are_told_at_once_and_layers_are_folded(place):
    shutil.rmtree("helpful")
    tiny_llama(place / "helpful", intermediate_size=40)
    rewrite(place / "harmless", model__norm__weight=None, lm_head__bias=torch.zeros(3))
    tiny_tokenizer(place / "honest", tuple(reversed(WORDS)))
    findings = refused(DataError, place)
    assert DataError.exit_code == 65
    assert "helpful: model.layers.*.mlp.gate_proj.weight (layers 0-1) has shape (40, 32), the base has (48, 32)" in findings
    assert "helpful: model.layers.*.mlp.down_proj.weight (layers 0-1) has shape (32, 40), the base has (32, 48)" in findings
    assert "harmless: misses model.norm.weight" in findings
    assert "harmless: does not know what to do with lm_head.bias" in findings
    [tokenizer] = [finding for finding in findings if "tokenizer" in finding]
    assert tokenizer.startswith("honest: tokenizer differs from the base's in 36 tokens (such as 'ask0'")
    assert len(findings) == 6  # up_proj as well


def test_settings_that_change_the_meaning_of_equal_weights_are_refused(place):
    config = read_json(place / "honest" / "config.json")
    config["rope_parameters"]["rope_theta"] = 5e5
    write_json(place / "honest" / "config.json", {**config, "rms_norm_eps": 1e-5})
    findings = refused(DataError, place)
    assert any("honest: rms_norm_eps is 1e-05, the base has 1e-06" in finding for finding in findings)
    assert any("honest: rope_parameters is" in finding for finding in findings)
    assert len(findings) == 2


def test_a_family_that_cannot_become_experts_is_refused(place):
    config = read_json(place / "base" / "config.json")
    write_json(place / "base" / "config.json", {**config, "model_type": "gpt2"})
    assert "model_type 'gpt2' cannot become experts (works: llama, mistral, qwen3)" in refused(DataError, place)[0]


def test_a_config_that_transformers_cannot_read_is_one_line(place):
    config = read_json(place / "base" / "config.json")
    write_json(place / "base" / "config.json", {**config, "hidden_size": "many"})
    assert refused(DataError, place)[0].startswith("base/config.json: ")


def test_another_number_of_layers_is_refused(place):
    shutil.rmtree("honest")
    tiny_llama(place / "honest", num_hidden_layers=3)
    findings = refused(DataError, place)
    assert "honest: does not know what to do with model.layers.*.mlp.up_proj.weight (layers 2)" in findings


def test_a_broken_shard_is_refused(place):
    (place / "honest" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00broken")
    assert "honest/model.safetensors: not a readable safetensors file" in refused(DataError, place)[0]


# ---------------------------------------------------------------- warnings


def test_plain_models_give_no_warning(place):
    assert plan().warnings == ()


def test_shared_weights_that_are_not_the_bases_are_counted(place):
    weights = load_file("honest/model.safetensors")
    rewrite(place / "honest", model__norm__weight=weights["model.norm.weight"] + 1, lm_head__weight=-weights["lm_head.weight"])
    [warning] = plan().warnings
    assert warning.startswith("honest: 2 of 15 shared tensors")
    assert plan("shared=average").warnings == ()


def test_equal_sources_are_pointed_out(place):
    [warning] = plan("models.honest=helpful").warnings
    assert warning == "helpful and honest: the FFNs are equal"
    [warning] = plan("models={a: base, b: base}").warnings
    assert warning.startswith("the FFNs of all sources are equal")


# ---------------------------------------------------------------- adapters


def adapter(place, **settings):
    """A LoRA adapter by hand, written as PEFT writes it: up_proj of layer 1, r = 2."""
    folder = place / "adapter"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": str(place / "base")}
    write_json(folder / "adapter_config.json", {**config, **settings})
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(48, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def put(folder, **tensors):
    saved = load_file(folder / "adapter_model.safetensors")
    saved.update({name.replace("__", "."): values for name, values in tensors.items()})
    save_file(saved, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"up_proj": 5}}, 2.5),
        ({"alpha_pattern": {"down_proj": 5, r"layers\.0\.mlp\.up_proj": 7}}, 3.0),
    ],
)
def test_the_scale_of_an_adapter_is_pefts(place, settings, scale):
    source = AdapterSource("x", adapter(place, **settings), ModelFolder(place / "base"))
    name = "model.layers.1.mlp.up_proj.weight"
    base, tensors = ModelFolder(place / "base").tensor(name), load_file(place / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(source.tensor(name), base + scale * b @ a)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.tensor(untouched), ModelFolder(place / "base").tensor(untouched))
    assert source.changed([name, untouched]) == [name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA' (works: 'LORA')"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True"),
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "all"}, "bias: 'all' (works: 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
    ],
)
def test_only_plain_lora_is_taken(place, settings, said):
    adapter(place, **settings)
    assert said in refused(DataError, place, "models.honest=adapter")[0]


def test_adapters_that_do_not_fit_the_base_are_refused(place):
    prefix = "base_model__model__model__layers__{}__mlp__up_proj__lora_{}__weight"
    parts = {"A": torch.zeros(2, 32), "B": torch.zeros(48, 2)}
    put(adapter(place), **{prefix.format(7, part): values for part, values in parts.items()})
    assert "which the base base does not have" in refused(DataError, place, "models.honest=adapter")[0]
    put(adapter(place), **{prefix.format(0, "A"): parts["A"]})
    assert "only lora_A is there" in refused(DataError, place, "models.honest=adapter")[0]
    put(adapter(place), **{prefix.format(0, "A"): torch.zeros(2, 31), prefix.format(0, "B"): parts["B"]})
    assert "A (2, 31), B (48, 2) do not fit the base's (48, 32)" in refused(DataError, place, "models.honest=adapter")[0]
    put(adapter(place), base_model__model__lm_head__weight=torch.zeros(42, 32))
    assert "has embeddings of its own" in refused(DataError, place, "models.honest=adapter")[0]
    put(adapter(place), base_model__model__model__norm__weight=torch.zeros(32))
    assert "1 tensors are not LoRA of a linear layer" in refused(DataError, place, "models.honest=adapter")[0]
    (place / "adapter" / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(MissingInputError, place, "models.honest=adapter")[0]


def test_an_adapter_of_attention_or_of_another_base_is_warned_about(place):
    folder = adapter(place, base_model_name_or_path="meta/another-base")
    prefix = "base_model__model__model__layers__0__self_attn__q_proj__lora_{}__weight"
    put(folder, **{prefix.format("A"): torch.ones(2, 32), prefix.format("B"): torch.ones(32, 2)})
    named, shared = plan("models.honest=adapter").warnings
    assert named == "honest: the adapter says it was made for 'meta/another-base'"
    assert shared.startswith("honest: 1 of 15 shared tensors")


def test_a_recipe_is_plain_data(place):
    """What a person writes is what is checked: the recipe survives a trip through JSON, order included."""
    recipe = load_recipe(FuseRecipe, "fuse.yaml")
    again = FuseRecipe.model_validate(json.loads(recipe.model_dump_json()))
    assert again == recipe
    assert list(again.models) == list(LABELS)
