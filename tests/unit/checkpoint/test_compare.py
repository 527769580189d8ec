"""verify finds nothing in sound models of any kind, and two models are the same whatever their layouts and number formats."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.verify import examine, verify
from h3scale.cli.checkpoint import app
from h3scale.errors import DataError, UnsafeError, UsageError
from h3scale.model.families import MOE_FAMILIES
from h3scale.model.names import LAYOUTS
from tests.unit.checkpoint.conftest import save_tokenizer
from tests.unit.checkpoint.layouts_reference import save_layout, tiny_moe

NO_TOKENIZER = "has no tokenizer"


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def layouts(request, tmp_path_factory):
    """A tiny model in every layout."""
    folder, moe = tmp_path_factory.mktemp(request.param), tiny_moe(request.param)
    return {layout: save_layout(folder / layout, moe, layout) for layout in LAYOUTS}


def _unlike(report):
    """What was found, but that there is no tokenizer."""
    return [finding.text for finding in report.findings if NO_TOKENIZER not in finding.text]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_found_in_a_sound_model_of_any_layout_and_all_are_the_same_model(layouts, layout):
    report = examine(layouts[layout], layouts["hub"], logits=True)
    assert _unlike(report) == []
    assert report.num_equal_tensors == len(load_file(layouts["hub"] / "model.safetensors"))
    assert report.max_abs_difference == 0.0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_found_in_what_transformers_saves(tmp_path, family, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 33, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=1, head_dim=8, tie_word_embeddings=family == "qwen3")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, size in (("one", "5GB"), ("many", "2KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        save_tokenizer(tmp_path / name)
        assert _unlike(examine(tmp_path / name)) == []
    assert _unlike(examine(tmp_path / "one", tmp_path / "many", logits=True)) == []


def test_tied_embeddings_that_are_stored_twice_are_one_model(model, tmp_path):
    shutil.copytree(model, tmp_path / "twice")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "twice" / "model.safetensors")
    assert _unlike(examine(tmp_path / "twice", model)) == []


@pytest.mark.parametrize(("stage", "world_size", "ep_size"), [(3, 1, 1), (3, 4, 2), (2, 2, 2), (2, 4, 1)])
def test_nothing_is_found_in_checkpoints_of_any_topology(shard, model, stage, world_size, ep_size):
    step = shard(world_size=world_size, ep_size=ep_size, stage=stage)
    report = examine(step, model, logits=True)
    assert report.findings == []
    assert report.max_abs_difference < report.logit_limit
    assert report.num_equal_tensors == len(load_file(model / "model.safetensors"))
    bare = examine(step / "deepspeed")
    assert bare.findings == []
    assert bare.num_parameters == report.num_parameters


@pytest.mark.parametrize("tag", ["..", "../x", "/etc", "a\0b", ""])
def test_the_tag_that_latest_names_is_beside_it(shard, tag):
    step = shard()
    (step / "deepspeed").rename(step / "global_step3")
    (step / "manifest.json").unlink()
    (step / "latest").write_text("global_step3")
    assert examine(step).findings == []
    (step / "latest").write_text(tag)
    with pytest.raises(UnsafeError, match="no folder beside it"):
        examine(step)


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_of_links_whose_sums_are_their_names(model, tmp_path):
    from h3scale.checkpoint.receipt import sha256

    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        digest = sha256(path)
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    assert examine(snapshot).findings == []
    blob = (snapshot / "generation_config.json").resolve()
    blob.write_text(json.dumps(read_json(blob) | {"pad_token_id": 1}))
    assert "differs from its name in the hub's cache" in examine(snapshot).errors[0]


def test_models_are_compared_in_the_coarser_number_format(training, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        consolidate(training, tmp_path / str(dtype), dtype=dtype)
    report = verify(tmp_path / "torch.float32", tmp_path / "torch.bfloat16", logits=True)
    assert report.compared_as == "bfloat16"
    assert report.num_equal_tensors == report.num_tensors
    assert "expected, since these are not both fp32" in report.warnings[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_has_changed_places_is_named_across_layouts(layouts, layout, tmp_path):
    shutil.copytree(layouts["hub"], tmp_path / "changed")
    config = read_json(tmp_path / "changed" / "config.json")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    experts = {name: values for name, values in tensors.items() if "layers.0." in name and ".experts." in name}
    places = {".experts.0.": ".experts.2.", ".experts.2.": ".experts.0."}
    for name in experts:  # 0 and 2 change places, in expert 1 gate and up do
        for place, other in places.items():
            if place in name:
                tensors[name] = experts[name.replace(place, other)]
    gate, up = ("w1", "w3") if config["model_type"] == "mixtral" else ("gate_proj", "up_proj")
    one, other = (next(name for name in experts if f".experts.1.{word}." in name) for word in (gate, up))
    tensors[one], tensors[other] = experts[other], experts[one]
    router = next(name for name in tensors if "layers.1." in name and name.endswith(".gate.weight"))
    tensors[router] = tensors[router][[1, 0, 2]].contiguous()
    tensors["model.norm.weight"][:2] += 0.5
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    errors = examine(tmp_path / "changed", layouts[layout]).errors
    by, norm = f" (by {layouts[layout]})", tensors["model.norm.weight"]
    rows = next(error for error in errors if error.endswith("the same rows in another order, [1, 0, 2]"))
    assert rows.startswith(f"{tmp_path / 'changed'}: {router} is not what {layouts[layout]} holds")
    assert {error.removeprefix(f"{tmp_path / 'changed'}: ") for error in errors if error != rows} == {
        f"experts 0 and 2 are swapped in layer 0{by}",
        f"{gate} and {up} of expert 1 are swapped in layer 0{by}",
        f"model.norm.weight is not what {layouts[layout]} holds: 2 of {norm.numel()} values differ, by 0.5 at most",
    }


def test_other_tensors_and_other_shapes_are_found(layouts, tmp_path):
    other = save_layout(
        tmp_path / "other", tiny_moe(read_json(layouts["hub"] / "config.json")["model_type"], layers=3, inner=8), "hub"
    )
    errors = examine(layouts["hub"], other).errors
    assert any("model.layers.2.self_attn.q_proj.weight is missing, which" in error for error in errors)
    assert any(f"(12, 8), in {other} (8, 8)" in error for error in errors)


def test_logits_find_what_the_names_hide(layouts, tmp_path):
    """The same tensors, another number of experts a token: only what is computed differs."""
    shutil.copytree(layouts["hub"], tmp_path / "changed")
    config = read_json(tmp_path / "changed" / "config.json")
    write_json(tmp_path / "changed" / "config.json", config | {"num_experts_per_tok": 1})
    assert examine(tmp_path / "changed", layouts["hub"]).errors == []
    (error,) = examine(tmp_path / "changed", layouts["hub"], logits=True).errors
    assert "logits differ from those of" in error


def test_an_export_whose_experts_are_shuffled_is_not_the_training_model(training, tmp_path):
    """Row 64: wrong in every layout that experts can be exported to, and said so by weights and by logits."""
    for layout in LAYOUTS:
        folder = tmp_path / layout
        convert(training, folder, to=layout)
        verify(folder, training)
        tensors = load_file(folder / "model.safetensors")
        router = next(name for name in tensors if name.endswith(("router.gate.weight", "gate.weight", "layer.weight")))
        save_file(tensors | {router: tensors[router].flip(0).contiguous()}, folder / "model.safetensors")
        (folder / "receipt.json").unlink()
        weights, logits = examine(folder, training).errors
        assert "the same rows in another order, [3, 2, 1, 0]" in weights
        assert "logits differ from those of the trained engine" in logits


def test_a_folder_without_a_config_is_verified_by_another_one(model, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "model.safetensors", tmp_path / "bare")
    assert examine(tmp_path / "bare", model, config_from=model).findings == []


@pytest.fixture
def adapter(tmp_path):
    """A PEFT adapter of two matrices."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for part, shape in (("A", (2, 16)), ("B", (16, 2))):
        for module in ("q_proj", "o_proj"):
            tensors[f"base_model.model.model.layers.0.self_attn.{module}.lora_{part}.weight"] = torch.ones(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    return folder


def test_an_adapter_is_verified_too(adapter):
    assert examine(adapter).findings == []
    assert examine(adapter, adapter).num_equal_tensors == 4
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.zeros(16, 2)}, path)
    assert ["the update changes nothing" in text for text in examine(adapter).warnings] == [True]
    save_file({other: values for other, values in tensors.items() if other != name}, path)
    assert "only lora_A is there" in examine(adapter).errors[0]
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 4})
    save_file(tensors, path)
    assert "r: 8, but" in examine(adapter).errors[0]


def test_json_says_all_in_one_object(model, tmp_path):
    done = CliRunner().invoke(app, ["verify", str(model), "--against", str(model), "--logits", "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["exit_code"], report["findings"], report["kind"]) == (0, 0, [], "model folder")
    assert report["num_equal_tensors"] == report["num_tensors"] == len(load_file(model / "model.safetensors"))
    shutil.copytree(model, tmp_path / "bad")
    write_json(tmp_path / "bad" / "config.json", read_json(model / "config.json") | {"dtype": "float16"})
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "bad"), "--json"])
    (finding,) = json.loads(done.stdout)["findings"]
    assert done.exit_code == DataError.exit_code
    assert finding.keys() == {"severity", "check", "text"}
    assert (finding["severity"], finding["check"]) == ("error", "dtype")


def test_logits_without_another_model_are_refused(model):
    done = CliRunner().invoke(app, ["verify", str(model), "--logits"])
    assert isinstance(done.exception, UsageError)
