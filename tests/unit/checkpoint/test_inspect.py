"""What lies at a path is told for every kind, without reading a value."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from h3scale.checkpoint.extents import Stored
from h3scale.checkpoint.inspect import inspect
from h3scale.checkpoint.manifest import read_manifest, write_manifest
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.cli.checkpoint import app
from h3scale.errors import DataError, MissingInputError, UnsafeError
from h3scale.model.names import LAYOUTS
from tests.tiny import tiny_dense
from tests.unit.checkpoint.layouts_reference import in_layout, save_layout, tiny_moe


@pytest.fixture(autouse=True)
def no_values_are_read(monkeypatch):
    monkeypatch.setattr(Stored, "values", lambda self: pytest.fail("read values"))


def numel(tensors):
    return sum(values.numel() for values in tensors.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_folder_in_any_layout(tmp_path, layout):
    moe = tiny_moe("qwen3_moe", experts=4)
    found = inspect(save_layout(tmp_path / "model", moe, layout))
    assert (found.kind, found.layout, found.model_type) == ("Hugging Face folder", layout, "qwen3_moe")
    assert (found.num_experts, found.top_k, found.num_layers, found.vocab_size) == (4, 2, 2, 11)
    tensors = in_layout(moe, layout)
    experts = numel({name: values for name, values in tensors.items() if ".experts." in name})
    assert (found.num_tensors, found.num_parameters) == (len(tensors), numel(tensors))
    assert found.num_active_parameters == numel(tensors) - experts // 2
    assert found.dtypes == {"float32": numel(tensors)}
    assert found.files["weights"] == [1, (tmp_path / "model" / "model.safetensors").stat().st_size]
    assert found.findings == []


def test_a_run_its_step_and_its_bare_tag_folder(shard, weights):
    newest = shard(step=7, world_size=4, ep_size=2)
    older = shard(step=3)
    write_manifest(older, read_manifest(older) | {"best": True})
    run, step, tag = inspect(newest.parent), inspect(newest), inspect(newest / "deepspeed")
    assert (run.step, run.steps, run.best_step, run.world_size) == (3, [3, 7], 3, 2)
    assert (step.step, step.world_size, step.ep_size, step.layout) == (7, 4, 2, "autoep")
    assert step.kind == tag.kind == "DeepSpeed ZeRO-3 with AutoEP"
    assert step.experts == ["helpful", "harmless", "honest", "general"]
    assert step.alignments == ["helpful", "harmless", "honest"]
    assert step.num_parameters == tag.num_parameters == numel(weights)
    assert (tag.model_type, tag.layout, tag.num_active_parameters) == (None, None, None)
    assert inspect(newest / "deepspeed", newest / "model").layout == "autoep"
    assert {kind: count for kind, (count, _) in step.files.items()}["optimizer states"] == 4
    assert step.findings == []


def test_deepspeeds_own_folder_by_its_latest(shard, tmp_path):
    folder = shard()
    (folder / "deepspeed").rename(tmp_path / "saved_global_step3")
    (tmp_path / "latest").write_text("saved_global_step3\n")
    assert inspect(tmp_path).path == str(tmp_path / "saved_global_step3")
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(UnsafeError, match="no folder beside it"):
        inspect(tmp_path)


def test_an_adapter(tmp_path):
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{prefix}A.weight": torch.zeros(2, 8), f"{prefix}B.weight": torch.zeros(12, 2)}, tmp_path / "adapter_model.safetensors"
    )
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "a/b"})
    found = inspect(tmp_path)
    assert (found.kind, found.num_parameters) == ("PEFT adapter", 2 * 8 + 12 * 2)
    assert (found.adapter["r"], found.adapter["base_model_name_or_path"]) == (2, "a/b")
    assert found.adapter["matrices"] == {"up_proj": 1}


def test_an_official_moe(tmp_path):
    states = {name: values.half() for name, values in in_layout(tiny_moe("qwen3_moe"), "hub").items() if "_norm." not in name}
    torch.save(states, tmp_path / "moe.pt")
    found = inspect(tmp_path / "moe.pt")
    assert (found.kind, found.dtypes) == ("H3Fusion moe.pt", {"float16": numel(states)})


def test_what_does_not_fit_the_config_is_listed(tmp_path):
    folder = save_layout(tmp_path / "model", tiny_moe(), "fused")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"intermediate_size": 13})
    assert any("config.json asks for" in finding for finding in inspect(folder).findings)
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output


def test_the_table_and_json_say_the_same(tmp_path):
    folder = tiny_dense("mistral", tmp_path / "dense")
    found = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output)
    assert found == inspect(folder).to_dict()
    table = CliRunner().invoke(app, ["inspect", str(folder)]).output
    for word in ("Hugging Face folder", "mistral", "2 layers", f"{found['num_parameters']:,}", "float32 100.0%"):
        assert word in table


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no such file"):
        inspect(tmp_path / "nothing")
    with pytest.raises(MissingInputError, match="no checkpoint"):
        inspect(tmp_path)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(DataError, match="not a readable torch file"):
        inspect(tmp_path / "text.pt")
