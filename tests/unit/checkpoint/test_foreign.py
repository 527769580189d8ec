"""Models of others: PEFT adapters merged as PEFT merges them, and the official moe.pt, which is read with a warning."""

import logging
import os
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.receipt import RECEIPT, check_receipt
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.checkpoint.verify import verify
from h3scale.cli.checkpoint import app
from h3scale.errors import DataError, MissingInputError, UnsafeError, UsageError
from tests.tiny import WORDS, tiny_config, tiny_dense, tiny_tokenizer
from tests.unit.checkpoint.layouts_reference import in_layout, tiny_moe

CHANGED = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_dense("llama", tmp_path_factory.mktemp("base") / "llama")


def adapter(base, folder, resized=0, **settings):
    """An adapter with random changes, as PEFT saves it; `resized`: rows of the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if resized:
        model.resize_token_embeddings(resized)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": CHANGED} | settings
    peft = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder, save_embedding_layers=bool(resized))
    return folder


def merged_by_peft(base, folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.mlp.up_proj": 2}, "rank_pattern": {"q_proj": 2}},
    ],
)
def test_an_adapter_is_merged_as_peft_merges_it(base, tmp_path, settings):
    folder = adapter(base, tmp_path / "adapter", **settings)
    convert(folder, tmp_path / "out", to="hub", max_shard_bytes=20_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert_close(loaded.state_dict(), merged_by_peft(base, folder))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert check_receipt(tmp_path / "out" / RECEIPT)[1] == []


def test_an_adapter_with_tokens_of_its_own_brings_their_rows_and_its_tokenizer(base, tmp_path):
    words = (*WORDS, "new0", "new1")
    rows = len(tiny_tokenizer(words=words))
    folder = adapter(base, tmp_path / "adapter", resized=rows)
    tiny_tokenizer(folder, words)
    convert(folder, tmp_path / "out", to="hub", base=base)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.vocab_size == rows
    assert_close(loaded.state_dict(), merged_by_peft(base, folder, rows))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_rows_go_by_token_where_the_adapters_tokenizer_counts_otherwise(base, tmp_path):
    folder = adapter(base, tmp_path / "adapter")
    tiny_tokenizer(folder, tuple(reversed(WORDS)))
    convert(folder, tmp_path / "out", to="hub")
    before, after = tiny_tokenizer().get_vocab(), tiny_tokenizer(words=tuple(reversed(WORDS))).get_vocab()
    source, written = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert all(torch.equal(written[name][after[token]], source[name][before[token]]) for token in before)
    assert before != after


def test_added_tokens_without_rows_are_refused_with_their_list(base, tmp_path):
    folder = adapter(base, tmp_path / "adapter")
    tiny_tokenizer(folder, (*WORDS, "new0", "new1"))
    with pytest.raises(DataError, match="has no row for 2 added tokens: 'new0', 'new1'"):
        convert(folder, tmp_path / "out", to="hub")
    folder = adapter(base, tmp_path / "other", resized=50)
    with pytest.raises(DataError, match=r"adds \d+ rows to the embeddings, and no tokenizer.json"):
        convert(folder, tmp_path / "out", to="hub")


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("peft_type", "IA3"), ("init_lora_weights", "pissa")])
def test_an_adapter_of_another_kind_is_refused(base, tmp_path, key, value):
    folder = adapter(base, tmp_path / "adapter")
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | {key: value})
    with pytest.raises(DataError, match=f"{key}: '?{value}"):
        convert(folder, tmp_path / "out", to="hub")


def test_an_adapter_needs_its_base_and_only_an_adapter_has_one(base, tmp_path):
    folder = adapter(base, tmp_path / "adapter")
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | {"base_model_name_or_path": "a/b"})
    with pytest.raises(MissingInputError, match=r"an adapter of 'a/b', which is no folder here .works: --base"):
        convert(folder, tmp_path / "out", to="hub")
    with pytest.raises(UsageError, match="this is no adapter"):
        convert(base, tmp_path / "out", to="hub", base=base)
    other = tiny_dense("llama", tmp_path / "other", intermediate_size=64)
    with pytest.raises(DataError, match="do not fit the base's"):
        convert(folder, tmp_path / "out", to="hub", base=other)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of the base, whose config moe.pt does not have."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    config = tiny_config("llama", hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def official(base, identical):
    """A state dict as the official code builds one: names of LlamaMLPs in a list; every adapter added to one shared parameter."""
    states = {}
    torch.manual_seed(5)
    for name, values in load_file(base / "model.safetensors").items():
        if ".mlp." not in name:
            states[name] = values.half()
            continue
        shared = values.half()
        for expert in range(3):
            place = shared if identical else values.half()
            place += torch.randn_like(place)
            states[name.replace("mlp", f"mlp.experts.{expert}")] = place
    for layer in range(2):
        states[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(3, 8).half()
    return states


@pytest.mark.parametrize(("identical", "stored_once"), [(True, True), (True, False), (False, False)])
def test_an_official_moe_becomes_a_mixtral_and_says_when_its_experts_are_one(llama, tmp_path, caplog, identical, stored_once):
    states = official(llama, identical)
    torch.save({name: values if stored_once else values.clone() for name, values in states.items()}, tmp_path / "moe.pt")
    with caplog.at_level(logging.WARNING, "h3scale"):
        convert(tmp_path / "moe.pt", tmp_path / "out", to="hub", config_from=llama)
    assert ("experts 0, 1, 2 are identical" in caplog.text) == identical
    assert check_receipt(tmp_path / "out" / RECEIPT)[1] == []
    assert read_json(tmp_path / "out" / RECEIPT)["experts"] == {"layers": 2, "experts": 3, "matrices": 3, "arrived": 18}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16, output_loading_info=True)
    assert not any(info.values())
    config = read_json(tmp_path / "out" / "config.json")
    assert config["h3scale"]["experts"] == ["helpful", "harmless", "honest"]
    assert (config["num_experts_per_tok"], config["dtype"]) == (2, "float16")
    for layer in range(2):
        block = loaded.model.layers[layer].mlp
        assert torch.equal(block.gate.weight, states[f"model.layers.{layer}.mlp.gate.weight"])
        for expert in range(3):
            gate, up, down = (states[f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            assert torch.equal(block.experts.gate_up_proj[expert], torch.cat([gate, up]))
            assert torch.equal(block.experts.down_proj[expert], down)
    assert torch.equal(loaded.model.embed_tokens.weight, states["model.embed_tokens.weight"])


@pytest.mark.parametrize("layout", ["fused", "megablocks"])
def test_experts_that_the_file_stored_once_arrive_in_every_layout(llama, tmp_path, layout):
    torch.save(official(llama, True), tmp_path / "moe.pt")
    convert(tmp_path / "moe.pt", tmp_path / "out", to=layout, config_from=llama)
    assert check_receipt(tmp_path / "out" / RECEIPT)[1] == []
    same = verify(tmp_path / "out", tmp_path / "moe.pt", config_from=llama)
    assert same.num_equal_tensors == 2 * (3 * 3 + 1) + sum(".mlp." not in name for name in load_file(llama / "model.safetensors"))


def _unsaid(pieces):
    del pieces[1]["shares"]


def _of_one_tensor(pieces):
    pieces[2]["tensor"] = pieces[1]["tensor"]


def _a_part_of_it(pieces):
    for run in pieces[1]["bytes"]:
        run[2] -= 2


@pytest.mark.parametrize("edit", [_unsaid, _of_one_tensor, _a_part_of_it])
def test_bytes_of_two_experts_are_one_only_when_the_file_itself_stored_both_once(llama, tmp_path, edit):
    torch.save(official(llama, True), tmp_path / "moe.pt")
    convert(tmp_path / "moe.pt", tmp_path / "out", to="hub", config_from=llama)
    receipt = read_json(tmp_path / "out" / RECEIPT)
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(3)]
    pieces = [receipt["tensors"][name]["from"][0] for name in names]
    assert [piece.get("shares") for piece in pieces] == [None, pieces[0]["tensor"], pieces[0]["tensor"]]
    edit(pieces)
    write_json(tmp_path / "out" / RECEIPT, receipt)
    assert any("are made of the same bytes" in finding for finding in check_receipt(tmp_path / "out" / RECEIPT)[1])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_moe_that_would_run_code_is_refused_and_runs_none(llama, tmp_path):
    torch.save({"a": torch.zeros(2), "b": Hostile(tmp_path / "ran")}, tmp_path / "moe.pt")
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "moe.pt"), str(tmp_path / "out"), "--to", "hub", "--config-from", str(llama)]
    )
    assert isinstance(done.exception, UnsafeError)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UnsafeError, match="a bare pickle"):
        convert(tmp_path / "bare.pt", tmp_path / "out", to="hub", config_from=llama)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_torch_file_that_is_no_moe_is_refused(llama, tmp_path):
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    with pytest.raises(DataError, match=r"so this is no moe\.pt"):
        convert(tmp_path / "numbers.pt", tmp_path / "out", to="hub", config_from=llama)
    torch.save(in_layout(tiny_moe(), "fused"), tmp_path / "fused.pt")
    with pytest.raises(DataError, match=r"so this is no moe\.pt"):
        convert(tmp_path / "fused.pt", tmp_path / "out", to="hub", config_from=llama)
    torch.save(official(llama, True), tmp_path / "moe.pt")
    with pytest.raises(MissingInputError, match="works: --config-from BASE"):
        convert(tmp_path / "moe.pt", tmp_path / "out", to="hub")


def test_a_folder_is_not_replaced_by_what_is_made_from_it(base, tmp_path):
    save_file(load_file(base / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(UnsafeError, match="would replace what it is made from"):
        convert(tmp_path, tmp_path, to="hub", force=True)


@pytest.mark.parametrize("identical", [True, False])
def test_an_official_moe_is_verified_and_is_what_it_was_converted_to(llama, tmp_path, identical):
    torch.save({name: values.clone() for name, values in official(llama, identical).items()}, tmp_path / "moe.pt")
    report = verify(tmp_path / "moe.pt", config_from=llama)
    assert any("experts 0 and 1 have identical weights in layers 0, 1" in warning for warning in report.warnings) == identical
    convert(tmp_path / "moe.pt", tmp_path / "out", to="hub", config_from=llama)
    same = verify(tmp_path / "out", tmp_path / "moe.pt", config_from=llama, logits=True)
    assert (same.num_equal_tensors, same.max_abs_difference) == (same.num_tensors, 0.0)
