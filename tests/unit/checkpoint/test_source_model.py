"""A model in any layout is the same tensors, read from where they lie; mixed or broken ones are refused."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from h3scale.checkpoint.extents import Computed, Extent, Stored
from h3scale.checkpoint.layouts import read_columns
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.source_model import open_model
from h3scale.errors import DataError, MissingInputError, UnsafeError
from h3scale.model.families import MOE_FAMILIES
from h3scale.model.names import LAYOUTS
from tests.unit.checkpoint.layouts_reference import in_layout, save_layout, tiny_moe


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def moe(request):
    return tiny_moe(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_in_any_layout_has_the_tensors_of_the_hub(moe, tmp_path, layout):
    model = open_model(save_layout(tmp_path / "model", moe, layout))
    expected = in_layout(moe, "hub")
    assert model.layout == layout
    assert model.shapes == {name: values.shape for name, values in expected.items()}
    assert all(torch.equal(model.values(name), values) for name, values in expected.items())
    turned = next(name for name in expected if ".experts.2." in name)
    assert torch.equal(model.source(turned, transposed=True).values(), expected[turned].T)


def test_transformers_own_saves_are_the_hub_and_the_fused_layout(moe, tmp_path):
    for layout, original in (("hub", True), ("fused", False)):
        moe.save_pretrained(tmp_path / layout, save_original_format=original, max_shard_size="2KB")
        model = open_model(tmp_path / layout)
        assert model.layout == layout
        assert all(torch.equal(model.values(name), values) for name, values in in_layout(moe, "hub").items())


def test_only_what_lies_transposed_is_computed(moe, tmp_path):
    model = open_model(save_layout(tmp_path / "model", moe, "megablocks"))
    computed = {name for name in model.shapes if isinstance(model.source(name), Computed)}
    assert computed == {name for name in model.shapes if ".experts." in name and name.endswith((".w2.weight", ".down_proj.weight"))}


def test_a_training_checkpoint_opens_like_a_folder(shard, weights):
    model = open_model(shard(world_size=4, ep_size=2).parent)
    assert (model.layout, model.step, model.weights.ep_size) == ("autoep", 3, 2)
    assert all(torch.equal(model.values(name), values) for name, values in weights.items())


@pytest.mark.parametrize("cuts", [[0, 60], [0, 13, 14, 31, 60], [0, 1, 2, 3, 60], [0, 12, 24, 36, 60]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_read_from_files_that_meet_anywhere(tmp_path, cuts, dtype):
    values = torch.arange(60).to(dtype).view(10, 6)
    extents = []
    for i, (low, high) in enumerate(pairwise(cuts)):
        piece = values.flatten()[low:high].view(torch.uint8).numpy().tobytes()
        (tmp_path / str(i)).write_bytes(b"..." + piece)
        extents.append(Extent(tmp_path / str(i), 3, len(piece)))
    stored = Stored((10, 6), dtype, tuple(extents))
    for start in range(6):
        for stop in range(start + 1, 7):
            assert torch.equal(read_columns(stored, start, stop), values[:, start:stop])


def test_layouts_that_are_mixed_are_refused(moe, tmp_path):
    folder = save_layout(tmp_path / "model", moe, "hub")
    tensors = in_layout(moe, "hub") | {n: v for n, v in in_layout(moe, "fused").items() if n.endswith("1.mlp.experts.down_proj")}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"in several layouts: .* is hub, .* is fused"):
        open_model(folder)


def test_a_layout_with_a_tensor_missing_or_of_another_shape_is_refused(tmp_path):
    moe = tiny_moe()
    folder = save_layout(tmp_path / "model", moe, "fused")
    tensors = in_layout(moe, "fused")
    del tensors["model.layers.1.mlp.experts.down_proj"]
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 8, 13)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError) as caught:
        open_model(folder)
    assert [finding.split(": ", 1)[1] for finding in caught.value.findings] == [
        "model.layers.1.mlp.experts.down_proj (3, 8, 12) is missing",
        "model.layers.0.mlp.experts.down_proj is (3, 8, 13), config.json asks for (3, 8, 12)",
    ]


def test_a_mixture_without_experts_is_refused(tmp_path):
    folder = save_layout(tmp_path / "model", tiny_moe(), "hub")
    tensors = {name: values for name, values in load_file(folder / "model.safetensors").items() if ".experts." not in name}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="no tensor is an expert"):
        open_model(folder)


def test_weights_without_a_config_take_another_folders(tmp_path):
    folder = save_layout(tmp_path / "model", tiny_moe(), "megablocks")
    (tmp_path / "config").mkdir()
    (folder / "config.json").rename(tmp_path / "config" / "config.json")
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        open_model(folder)
    assert open_model(folder, tmp_path / "config").layout == "megablocks"


def test_what_a_tied_model_has_twice_is_left_out(tmp_path):
    moe = tiny_moe(tie_word_embeddings=True)
    folder = save_layout(tmp_path / "model", moe, "hub")
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in open_model(folder).weights.entries


def _lead_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    names = load_file(folder.parent / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "../model.safetensors")})


def _name_twice(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _cut_off(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])


def _header_twice(folder):
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["lm_head.weight"])
    text = header[:-1] + f', "lm_head.weight": {entry}}}'.encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    ("harm", "error", "text"),
    [
        (_lead_outside, UnsafeError, "outside the folder"),
        (_name_twice, DataError, "has 'lm_head.weight', which .* has in b.safetensors"),
        (_cut_off, DataError, "not a readable safetensors file"),
        (_header_twice, DataError, "not a readable safetensors file|twice"),
    ],
)
def test_broken_folders_are_refused(tmp_path, harm, error, text):
    folder = save_layout(tmp_path / "model", tiny_moe(), "hub")
    harm(folder)
    assert read_json(folder / "config.json")
    with pytest.raises(error, match=text):
        open_model(folder)
