"""Model folders are read one tensor at a time, and written whole or not at all."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from h3scale.checkpoint import shards
from h3scale.checkpoint.shards import (
    INDEX,
    WEIGHTS,
    ModelFolder,
    TensorSpec,
    check_output,
    copy_tokenizer,
    new_folder,
    read_json,
    write_json,
    write_model,
)
from h3scale.errors import DataError, MissingInputError, OutputError, UnsafeError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.arange(5),
}
SPECS = [TensorSpec(name, tuple(values.shape), values.dtype) for name, values in TENSORS.items()]


@pytest.fixture
def folder(tmp_path):
    """A folder of three tensors in three shards."""
    path = tmp_path / "model"
    path.mkdir()
    write_model(path, {"model_type": "llama"}, SPECS, TENSORS.__getitem__, max_shard_bytes=1)
    return path


def test_what_is_written_is_read_back_bit_for_bit(folder):
    model = ModelFolder(folder)
    assert model.specs == {spec.name: spec for spec in SPECS}
    assert all(torch.equal(model.tensor(name), values) for name, values in TENSORS.items())
    assert model.config == {"model_type": "llama"}


def test_shards_are_indexed_as_hugging_face_does(folder):
    index = read_json(folder / INDEX)
    assert index["weight_map"] == {name: f"model-{i:05d}-of-00003.safetensors" for i, name in enumerate(TENSORS, start=1)}
    assert index["metadata"]["total_size"] == 12 * 4 + 6 * 2 + 5 * 8


def test_what_fits_into_one_shard_has_no_index(tmp_path):
    write_model(tmp_path, {}, SPECS, TENSORS.__getitem__)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert load_file(tmp_path / WEIGHTS).keys() == TENSORS.keys()


def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(tmp_path):
    specs = [TensorSpec(f"t{i}", (10,), torch.float32) for i in range(7)]
    write_model(tmp_path, {}, specs, lambda name: torch.ones(10), max_shard_bytes=100)
    counts = [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert counts == [2, 2, 2, 1]


@pytest.mark.parametrize("wrong", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.float16)])
def test_a_tensor_of_another_shape_or_dtype_than_planned_is_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="a: planned"):
        write_model(tmp_path, {}, SPECS, lambda name: wrong if name == "a" else TENSORS[name])


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"model-00002-of-00003\.safetensors: named in"):
        ModelFolder(folder).specs  # noqa: B018


def test_an_index_that_points_outside_the_folder_is_refused(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UnsafeError, match="outside the folder"):
        ModelFolder(folder).files  # noqa: B018


def test_a_tensor_that_no_shard_has_is_named(folder):
    index = read_json(folder / INDEX)
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="'ghost' is in the index but in no shard"):
        ModelFolder(folder).specs  # noqa: B018
    with pytest.raises(DataError, match="has no tensor 'other'"):
        ModelFolder(folder).tensor("other")


@pytest.mark.parametrize("size", [0, 3, 40])
def test_a_torn_weights_file_is_refused(tmp_path, size):
    write_model(tmp_path, {}, SPECS, TENSORS.__getitem__)
    values = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(values[:size])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        ModelFolder(tmp_path).specs  # noqa: B018


def test_a_folder_without_config_or_weights_says_what_is_there(tmp_path):
    with pytest.raises(MissingInputError, match="no such model folder"):
        ModelFolder(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MissingInputError, match=r"no config.json.*found: pytorch_model.bin"):
        ModelFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingInputError, match="only safetensors are read"):
        ModelFolder(tmp_path).files  # noqa: B018


@pytest.mark.parametrize("text", ["{", "[1]", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"config\.json"):
        read_json(path)


def test_a_folder_appears_only_when_all_went_well(tmp_path):
    out = tmp_path / "out"

    def fail(partial):
        (partial / "half").touch()
        assert not out.exists()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), new_folder(out) as partial:
        fail(partial)
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as partial:
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_where_two_names_can_be_exchanged_an_output_that_is_replaced_is_never_missing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    there = []
    for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (shards, "exchange")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, **b: (plain(*a, **b), there.append(out.exists())))
    with new_folder(out, force=True) as partial:
        (partial / "new").touch()
    assert there
    assert all(there)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_where_they_cannot_be_it_is_replaced_all_the_same(tmp_path, monkeypatch):
    def cannot(one, other):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(shards, "exchange", cannot)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with new_folder(out, force=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_an_output_is_replaced_only_with_force_and_only_after_success(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OutputError, match="--force"), new_folder(out):
        pytest.fail("was let in")
    with pytest.raises(RuntimeError), new_folder(out, force=True):
        raise RuntimeError
    assert (out / "old").exists()
    with new_folder(out, force=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_an_empty_folder_counts_as_not_there(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), new_folder(tmp_path / "file" / "out"):
        pytest.fail("was let in")


def test_json_keeps_the_order_of_its_keys_and_leaves_nothing_else(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_only_the_tokenizers_files_are_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "secret.txt"):
        (source / name).write_text(name)
    save_file({"a": torch.zeros(1)}, source / WEIGHTS)
    copy_tokenizer(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
