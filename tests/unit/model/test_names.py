"""The table of names against what transformers itself writes and builds."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from h3scale.model.families import FAMILIES, MOE_FAMILIES
from h3scale.model.names import DENSE_FFN, MOE, PROJECTIONS, match
from tests.tiny import DENSE_FAMILIES, tiny_config

LAYERS, EXPERTS = 2, 3


@pytest.fixture(scope="module", params=MOE)
def moe(request):
    """A tiny model of each mixture-of-experts family."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20}
    sizes[MOE_FAMILIES[request.param].expert_size_key] = 48
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, **sizes, num_hidden_layers=LAYERS, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_names_are_the_ffn_of_every_dense_family(family):
    with torch.device("meta"):
        real = {name for name in AutoModelForCausalLM.from_config(tiny_config(family)).state_dict() if ".mlp." in name}
    assert real == {template.format(layer=layer) for template in DENSE_FFN.values() for layer in range(2)}


def test_hub_names_are_what_transformers_saves(tmp_path, moe):
    moe.save_pretrained(tmp_path)
    kinds = (".mlp.", ".block_sparse_moe.")
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        saved = {name: handle.get_tensor(name) for name in handle.keys() if any(kind in name for kind in kinds)}  # noqa: SIM118
    names = MOE[moe.config.model_type]
    wanted = {names.hub_router.format(layer=layer) for layer in range(LAYERS)}
    for template in names.hub_experts.values():
        wanted |= {template.format(layer=layer, expert=expert) for layer in range(LAYERS) for expert in range(EXPERTS)}
    assert set(saved) == wanted
    # Which projection is which: transformers stacks gate over up, so the halves tell the two apart.
    for layer in range(LAYERS):
        experts = moe.model.layers[layer].mlp.experts
        assert torch.equal(saved[names.hub_router.format(layer=layer)], moe.model.layers[layer].mlp.gate.weight)
        for expert in range(EXPERTS):
            gate, up = experts.gate_up_proj[expert].chunk(2)
            for projection, values in (("gate", gate), ("up", up), ("down", experts.down_proj[expert])):
                assert torch.equal(saved[names.hub_experts[projection].format(layer=layer, expert=expert)], values)


def test_every_family_has_names_for_every_projection():
    for family in FAMILIES.values():
        names = MOE[family.moe_type]
        assert set(names.hub_experts) == set(names.autoep_experts) == set(DENSE_FFN) == set(PROJECTIONS)


@pytest.mark.parametrize("expert", [0, 7, 10, 127])
def test_a_name_is_read_back_as_it_was_written(expert):
    for template in (template for names in MOE.values() for template in names.hub_experts.values()):
        assert match(template, template.format(layer=31, expert=expert)) == {"layer": 31, "expert": expert}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",  # another projection
        "model.layers.0.block_sparse_moe.experts.1.w1.weight_scale",  # more behind it
        "base.model.layers.0.block_sparse_moe.experts.1.w1.weight",  # more before it
        "model.layers.x.block_sparse_moe.experts.1.w1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w1-weight",  # the dot is a dot
    ],
)
def test_another_name_does_not_match(name):
    assert match(MOE["mixtral"].hub_experts["gate"], name) is None
