"""However the bytes are moved (kernel copy, blocks, threads), the same tensors arrive, and the receipt says where from."""

import errno
import hashlib
import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from h3scale.checkpoint import extents, stream
from h3scale.checkpoint.consolidate import consolidate
from h3scale.checkpoint.extents import Extent, Stored
from h3scale.checkpoint.receipt import RECEIPT, check_receipt
from h3scale.checkpoint.shard_files import DTYPES
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.cli.checkpoint import app
from h3scale.errors import DataError, MissingInputError, OutputError, UnsafeError, UsageError

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"receipt": None}, {"workers": 3}, {"receipt": None, "workers": 3, "fsync": False}])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_every_way_of_moving_bytes_gives_the_same_tensors(shard, weights, tmp_path, monkeypatch, dtype, options, block):
    for room in (stream, extents):
        monkeypatch.setattr(room, "BLOCK_BYTES", block)
    monkeypatch.setattr(stream, "PIECE_BYTES", 4 * block)
    consolidate(shard(world_size=4, ep_size=2), tmp_path / "out", dtype=dtype, **options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name].to(dtype)) for name in weights)


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, 0])
def test_a_file_system_that_copies_nothing_is_read_and_written(shard, weights, tmp_path, monkeypatch, answer):
    def refuse(*arguments):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse)
    consolidate(shard(), tmp_path / "out", receipt=None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_only_the_tensors_that_are_named_are_written(shard, weights, tmp_path):
    consolidate(shard(), tmp_path / "out", only="*.layers.1.*")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {name for name in weights if ".layers.1." in name}
    assert all(torch.equal(values, weights[name]) for name, values in written.items())
    assert check_receipt(tmp_path / "out" / RECEIPT) == (len(written), [])
    with pytest.raises(UsageError, match="--only: 'nothing' is none of"):
        consolidate(tmp_path / "run", tmp_path / "other", only="nothing")


def test_the_receipt_has_the_hash_of_every_tensor_and_the_bytes_it_came_from(shard, weights, tmp_path):
    folder = shard(world_size=4, ep_size=2, frozen=lambda name: False)
    consolidate(folder, tmp_path / "out", dtype=torch.bfloat16)
    receipt = read_json(tmp_path / "out" / RECEIPT)
    assert receipt["tensors"].keys() == weights.keys()
    for name, entry in receipt["tensors"].items():
        read = b"".join(
            (folder / file).read_bytes()[offset : offset + length] for file, offset, length in entry["from"][0]["bytes"]
        )
        assert torch.equal(
            torch.frombuffer(bytearray(read), dtype=DTYPES[entry["dtype_read"]]).view(weights[name].shape), weights[name]
        )
        assert hashlib.sha256(read).hexdigest() == entry["sha256_read"]
        assert entry["sha256"] == hashlib.sha256(extents.bytes_of(weights[name].bfloat16())).hexdigest()
    layers, experts = 2, 4
    assert receipt["experts"] == {"layers": layers, "experts": experts, "matrices": 3, "arrived": layers * experts * 3}
    assert receipt["tensors"][EXPERT]["from"][0]["expert"] == 3


def test_bytes_that_do_not_change_are_hashed_once(shard, tmp_path, monkeypatch):
    hashed = []
    real = hashlib.sha256

    class Counting:
        def __init__(self, *values):
            self.real = real(*values)

        def update(self, values):
            hashed.append(len(values))
            self.real.update(values)

        def hexdigest(self):
            return self.real.hexdigest()

    folder = shard()
    monkeypatch.setattr(stream.hashlib, "sha256", Counting)
    summary = consolidate(folder, tmp_path / "out")
    assert sum(hashed) == summary.num_bytes


def test_the_receipt_alone_proves_the_model(shard, tmp_path):
    receipt = tmp_path / "receipts" / "model.json"
    receipt.parent.mkdir()
    consolidate(shard(), tmp_path / "out", receipt=receipt)
    assert not (tmp_path / "out" / RECEIPT).exists()
    done = CliRunner().invoke(app, ["verify", str(receipt)])
    assert done.exit_code == 0, done.output
    assert "as they were written" in done.output
    values = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    values[-3] ^= 4
    (tmp_path / "out" / "model.safetensors").write_bytes(values)
    assert any("sha256 differs from model.json" in finding for finding in check_receipt(receipt)[1])
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(MissingInputError, match="no such model folder"):
        check_receipt(receipt)


def _drop(receipt):
    del receipt["tensors"][EXPERT]


def _twice(receipt):
    receipt["tensors"][EXPERT]["from"][0]["bytes"] = receipt["tensors"][EXPERT.replace("3.w2", "2.w2")]["from"][0]["bytes"]


@pytest.mark.parametrize(
    ("edit", "text"),
    [(_drop, "but its tensors are"), (_twice, "are made of the same bytes")],
)
def test_a_receipt_that_proves_nothing_is_found(shard, tmp_path, edit, text):
    consolidate(shard(), tmp_path / "out")
    receipt = read_json(tmp_path / "out" / RECEIPT)
    edit(receipt)
    write_json(tmp_path / "out" / RECEIPT, receipt)
    assert any(text in finding for finding in check_receipt(tmp_path / "out" / RECEIPT)[1])


@pytest.mark.parametrize(
    "text", ["{}", '{"format": 1}', '{"format": 1, "about": {}, "files": {}, "tensors": {"a": 1}, "experts": {}}']
)
def test_a_file_that_is_no_receipt_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=r"r\.json"):
        check_receipt(tmp_path / "r.json")


def test_values_are_found_in_the_file_where_torch_put_them(tmp_path):
    torch.manual_seed(0)
    saved = {"a": torch.randn(5, 3), "b": torch.arange(70)[20:50], "c": torch.randn(4).bfloat16(), "none": torch.empty(0, 3)}
    torch.save(saved, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert all(torch.equal(file.stored(file.states[name]).values(), values) for name, values in saved.items())
    assert torch.equal(file.stored(file.states["a"]).row(3).values(), saved["a"][3])
    with pytest.raises(DataError, match="does not lie where"):
        file.stored(file.states["a"].t())


def test_a_file_that_ends_early_is_a_finding(tmp_path):
    (tmp_path / "short").write_bytes(b"12345678")
    with pytest.raises(DataError, match="ends at byte 8"):
        Stored((4,), torch.float32, (Extent(tmp_path / "short", 0, 16),)).values()


def test_a_compressed_or_bare_pickle_is_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(DataError, match="is compressed"):
        TorchFile(tmp_path / "bomb.pt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeError, match="a bare pickle"):
        TorchFile(tmp_path / "old.pt")
    (tmp_path / "json.pt").write_text(json.dumps({}))
    with pytest.raises(DataError, match="not a readable torch file"):
        TorchFile(tmp_path / "json.pt")


def test_a_receipt_takes_no_other_files_place(shard, tmp_path):
    run, elsewhere = shard(), tmp_path / "r.json"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with pytest.raises(UsageError, match="is a name for another file"):
            consolidate(run, tmp_path / "out", receipt=name)
    with pytest.raises(OutputError, match="no such folder"):
        consolidate(run, tmp_path / "out", receipt=tmp_path / "nowhere" / "r.json")
    with pytest.raises(OutputError, match="exists already"):
        consolidate(run, tmp_path / "out", receipt=run / "manifest.json")
    consolidate(run, tmp_path / "out", receipt=elsewhere)
    with pytest.raises(OutputError, match="exists already"):
        consolidate(run, tmp_path / "other", receipt=elsewhere)
    first = elsewhere.read_bytes()
    (tmp_path / "out").rename(tmp_path / "gone")  # as after a kill between the receipt and the model's name
    consolidate(run, tmp_path / "out", receipt=elsewhere)
    assert elsewhere.read_bytes() == first
