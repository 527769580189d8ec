"""From layout to layout and back, no bit changes; what is written is what the owners of the layouts read."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from h3scale.checkpoint import layouts as layouts_module
from h3scale.checkpoint.convert import convert
from h3scale.checkpoint.inspect import inspect
from h3scale.checkpoint.receipt import RECEIPT, check_receipt
from h3scale.checkpoint.shards import ModelFolder, read_json, write_json
from h3scale.checkpoint.verify import examine
from h3scale.errors import DataError, UsageError
from h3scale.model.experts import ExpertMap
from h3scale.model.families import FAMILIES, MOE_FAMILIES, dense_config, moe_config
from h3scale.model.names import LAYOUTS
from tests.tiny import DENSE_FAMILIES, tiny_config
from tests.unit.checkpoint.layouts_reference import in_layout, save_layout, tiny_moe


def tensors(folder):
    opened = ModelFolder(folder)
    return {name: opened.tensor(name) for name in opened.files}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moe_type", MOE_FAMILIES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.sampled_from([4, 8, 20]),
    inner=st.integers(1, 17),
    experts=st.integers(2, 5),
    layers=st.integers(1, 2),
    shard=st.sampled_from([1, 500, 3000, 10**9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.sampled_from([64, 4 << 20]),
    hashing=st.booleans(),
)
def test_there_and_back_through_all_layouts_no_bit_changes(
    tmp_path_factory, moe_type, hidden, inner, experts, layers, shard, dtype, block, hashing
):
    place = tmp_path_factory.mktemp("x")
    moe = tiny_moe(moe_type, hidden, inner, experts, layers, num_attention_heads=1, num_key_value_heads=1).to(dtype)
    source = save_layout(place / "start", moe, "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts_module, "TRANSPOSED_BLOCK_BYTES", block)
        for layout in ("fused", "autoep", "megablocks", "megablocks", "hub"):
            target = place / f"{source.name}-{layout}"
            convert(source, target, to=layout, max_shard_bytes=shard, receipt=RECEIPT if hashing else None, fsync=False)
            assert same(tensors(target), in_layout(moe, layout))
            if hashing:
                assert check_receipt(target / RECEIPT) == (len(in_layout(moe, layout)), [])
            source = target


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_from_every_layout_to_every_other(tmp_path, source, target):
    moe = tiny_moe()
    folder = save_layout(tmp_path / "source", moe, source)
    convert(folder, tmp_path / "target", to=target)
    assert same(tensors(tmp_path / "target"), in_layout(moe, target))
    receipt = read_json(tmp_path / "target" / RECEIPT)
    experts, layers = moe.config.num_local_experts, moe.config.num_hidden_layers
    assert receipt["experts"] == {"layers": layers, "experts": experts, "matrices": 3, "arrived": layers * experts * 3}
    held = [piece["name"] for entry in receipt["tensors"].values() for piece in entry["from"]]
    assert sorted(held) == sorted(in_layout(moe, "hub"))
    assert (receipt["about"]["layout_read"], receipt["about"]["layout"]) == (source, target)


@pytest.mark.parametrize("source", LAYOUTS)
def test_the_receipt_has_the_sha256_of_what_a_tensor_was_computed_of(tmp_path, source):
    """MegaBlocks' w2 is every expert's matrix turned around."""
    moe = tiny_moe()
    folder = save_layout(tmp_path / "source", moe, source)
    convert(folder, tmp_path / "target", to="hub" if source == "megablocks" else "megablocks")
    tensors = read_json(tmp_path / "target" / RECEIPT)["tensors"]
    pieces = [piece for entry in tensors.values() for piece in entry["from"] if "made_of" in piece]
    assert len(pieces) == moe.config.num_hidden_layers * moe.config.num_local_experts
    for piece in pieces:
        (key, runs), *more = piece["made_of"].items()
        read = b"".join((folder / file).read_bytes()[start : start + length] for file, start, length in runs)
        assert (more, piece["sha256_read"]) == ([], {key: hashlib.sha256(read).hexdigest()})


@pytest.mark.parametrize("moe_type", MOE_FAMILIES)
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_transformers_loads_what_is_written_whole(tmp_path, moe_type, layout):
    moe = tiny_moe(moe_type)
    moe.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "autoep", to="autoep")
    convert(tmp_path / "autoep", tmp_path / "out", to=layout, max_shard_bytes=2000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert same(loaded.state_dict(), moe.state_dict())


def test_megablocks_weights_give_the_mixture_by_megablocks_own_definition(tmp_path):
    """A dense loop over experts in fp64, as MegaBlocks' grouped MLP computes: (act(x @ w1.T) * (x @ v1.T)) @ w2."""
    moe = tiny_moe(experts=4)
    convert(save_layout(tmp_path / "hub", moe, "hub"), tmp_path / "out", to="megablocks")
    written = {name: values.double() for name, values in tensors(tmp_path / "out").items()}
    config, prefix = moe.config, "model.layers.1.mlp."
    x = torch.randn(7, config.hidden_size, dtype=torch.float64)
    scores = F.softmax(x @ written[f"{prefix}router.layer.weight"].T, dim=-1)
    weights, chosen = scores.topk(config.num_experts_per_tok, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(x)
    size = config.intermediate_size
    for expert in range(4):
        w1, v1, w2 = (written[f"{prefix}experts.mlp.{w}"][expert * size : (expert + 1) * size] for w in ("w1", "v1", "w2"))
        of = (weights * (chosen == expert)).sum(dim=-1, keepdim=True)
        y += of * ((F.silu(x @ w1.T) * (x @ v1.T)) @ w2)
    moe.config._experts_implementation = "eager"  # the only one in fp64; the router's softmax is fp32 all the same
    with torch.no_grad():
        expected = moe.double().model.layers[1].mlp(x[None])[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_training_checkpoint_becomes_any_layout(shard, weights, tmp_path):
    for layout in LAYOUTS:
        convert(shard(name=layout, world_size=4, ep_size=2), tmp_path / "out" / layout, to=layout)
    for layout in LAYOUTS[1:]:
        convert(tmp_path / "out" / layout, tmp_path / "back" / layout, to="hub")
        assert same(tensors(tmp_path / "back" / layout), weights)
    assert same(tensors(tmp_path / "out" / "hub"), weights)
    assert (tmp_path / "back" / "fused" / "tokenizer.json").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_rounded_when_asked_and_kept_when_not(tmp_path, layout):
    moe = tiny_moe()
    source = save_layout(tmp_path / "hub", moe, "hub")
    convert(source, tmp_path / "half", to=layout, dtype=torch.bfloat16)
    assert same(tensors(tmp_path / "half"), in_layout(moe.bfloat16(), layout))
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
    convert(tmp_path / "half", tmp_path / "kept", to="hub")
    assert same(tensors(tmp_path / "kept"), in_layout(moe, "hub"))


def _with_experts(folder, experts):
    labels = {"alignments": sorted({e for e in experts if e}), "experts": experts}
    write_json(folder / "config.json", read_json(folder / "config.json") | {"h3scale": labels})


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_an_expert_alone_gives_the_logits_of_the_mixture_that_takes_no_other(tmp_path, family):
    """Law 2, with experts that differ: the router is set so that one expert is taken with weight 1."""
    torch.manual_seed(0)
    dense = tiny_config(family)
    config = moe_config(dense.to_dict(), ExpertMap(("a", "b"), ("a", "a", "b")), top_k=1)
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.save_pretrained(tmp_path / "moe")
    input_ids = torch.arange(12)[None]
    for name, expert in (("a/1", 0), ("1", 1), ("b", 2)):
        convert(tmp_path / "moe", tmp_path / name.replace("/", "-"), to="dense", expert=name)
        alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / name.replace("/", "-"), output_loading_info=True)
        assert not any(info.values())
        assert alone.config.model_type == family
        with torch.no_grad():
            expected = forced(moe, expert)(input_ids=input_ids).logits
            found = alone.eval()(input_ids=input_ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def forced(moe, expert):
    """The mixture with routers that give one expert all there is, whatever the token."""
    for layer in moe.model.layers:
        gate = layer.mlp.gate

        def forward(hidden, gate=gate):
            rows = hidden.reshape(-1, hidden.shape[-1]).shape[0]
            chosen = torch.full((rows, 1), expert)
            return torch.zeros(rows, gate.weight.shape[0]), torch.ones(rows, 1), chosen

        gate.forward = forward
    return moe


@pytest.mark.parametrize(
    ("family", "own"),
    [
        *((family, {}) for family in FAMILIES),
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    ],
)
def test_a_dense_config_that_became_a_mixture_comes_back(family, own):
    dense = tiny_config(
        family, architectures=[type(AutoModelForCausalLM.from_config(tiny_config(family))).__name__], **own
    ).to_dict()
    dense.pop("max_window_layers", None)  # says what layer_types says
    config = AutoConfig.for_model(**moe_config(dense, ExpertMap(("a",), ("a", None)), top_k=1)).to_dict()
    back = AutoConfig.for_model(**dense_config(config)).to_dict()
    assert {key: back.get(key) for key in dense} == dense


def test_experts_are_found_by_name_place_or_number(tmp_path):
    experts = ExpertMap(("a", "b"), ("a", "b", "a", None))
    assert [experts.find(name) for name in ("b", "a/1", "a/2", "a 2", "general", "3", "0")] == [1, 0, 2, 2, 3, 3, 0]
    with pytest.raises(DataError, match=r"2 experts are of this alignment .works: a/1, a/2"):
        experts.find("a")
    for wrong in ("c", "a/3", "a/0", "4", "-1"):
        with pytest.raises(DataError, match=r"there is none .works: a, b, a 2, general, 0 to 3"):
            experts.find(wrong)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"to": "dense"}, "which of the 3 experts"),
        ({"to": "hub", "expert": "1"}, "works: --to dense"),
        ({"to": "gguf"}, "works: hub, fused, autoep, megablocks"),
    ],
)
def test_what_cannot_be_asked_for_is_said(tmp_path, options, text):
    with pytest.raises(UsageError, match=text):
        convert(save_layout(tmp_path / "m", tiny_moe(), "hub"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_megablocks_experts_of_another_family_are_one_line_and_dbrx_has_them_of_its_own(tmp_path):
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "vocab_size": 40}
    mpt = AutoConfig.for_model("mpt", **sizes)
    foreign = {n: v.clone() for n, v in AutoModelForCausalLM.from_config(mpt).state_dict().items() if "_proj" not in n}
    for layer in range(2):  # as llm-foundry saves them
        block = f"transformer.blocks.{layer}.ffn."
        foreign |= {f"{block}experts.mlp.{name}": torch.zeros(4 * 32, 16) for name in ("w1", "v1", "w2")}
        foreign[f"{block}router.layer.weight"] = torch.zeros(4, 16)
    (tmp_path / "mpt").mkdir()
    save_file(foreign, tmp_path / "mpt" / "model.safetensors", metadata={"format": "pt"})
    mpt.save_pretrained(tmp_path / "mpt")
    line = r"experts\.mlp\.\w+ and 5 more are MegaBlocks' experts, which model_type 'mpt' .*\(works: mixtral, qwen3_moe,"
    with pytest.raises(DataError, match=line) as caught:
        convert(tmp_path / "mpt", tmp_path / "out", to="hub")
    assert len(caught.value.findings) == 1
    assert [
        error for error in examine(tmp_path / "mpt").errors if "MegaBlocks" in error or "missing" in error
    ] == caught.value.findings
    assert [said for said in inspect(tmp_path / "mpt").findings if "experts" in said] == caught.value.findings

    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1}
    dbrx = AutoConfig.for_model("dbrx", **sizes, attn_config={"kv_n_heads": 1, "rope_theta": 1e4}, ffn_config=ffn)
    AutoModelForCausalLM.from_config(dbrx).save_pretrained(tmp_path / "dbrx")
    assert any(name.endswith("experts.mlp.w1") for name in ModelFolder(tmp_path / "dbrx").files)
    convert(tmp_path / "dbrx", tmp_path / "out", to="hub")


def test_a_dense_model_has_one_layout(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match="a dense model has one layout"):
        convert(tmp_path / "m", tmp_path / "out", to="fused")
    convert(tmp_path / "m", tmp_path / "out", to="hub", max_shard_bytes=5000)
    assert same(tensors(tmp_path / "out"), load_file(tmp_path / "m" / "model.safetensors"))
