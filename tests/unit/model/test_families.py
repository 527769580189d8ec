"""What becomes of a dense model's config: what is carried over, what is refused, and who reads the result."""

import pytest
from transformers import AutoConfig

from h3scale.errors import DataError
from h3scale.model.experts import ExpertMap
from h3scale.model.families import AUTOEP_PRESETS, FAMILIES, MOE_FAMILIES, as_published, expert_size, moe_config, num_experts
from tests.tiny import DENSE_FAMILIES, tiny_config

PLAIN = {"model_type": "llama", "hidden_size": 32, "rope_theta": 5e5}
MAP = ExpertMap.of(("a", "b"), 2, 1)


def fused(family, top_k=2, **sizes):
    return moe_config(tiny_config(family, **sizes).to_dict(), MAP, top_k)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_transformers_reads_back_every_size_that_the_dense_config_had(family):
    dense, read = tiny_config(family), AutoConfig.for_model(**fused(family))
    assert (num_experts(read), expert_size(read), read.num_experts_per_tok) == (MAP.num_experts, dense.intermediate_size, 2)
    kept = ("hidden_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "sliding_window")
    for key in (*kept, "head_dim", "initializer_range", "eos_token_id", "max_position_embeddings"):
        assert getattr(read, key, None) == getattr(dense, key, None), key
    assert read.output_router_logits is False
    assert read.router_aux_loss_coef == 0
    assert ExpertMap.from_config(read) == MAP


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_no_key_is_left_that_the_fused_family_does_not_know(family):
    """head_dim apart: Qwen3-MoE reads it without naming it in its config."""
    config = fused(family)
    config.pop("h3scale")
    known = {"num_experts", "head_dim", *AutoConfig.for_model(config["model_type"]).to_dict()}
    assert not config.keys() - known


@pytest.mark.parametrize("moe_type", MOE_FAMILIES)
def test_sizes_are_read_whichever_word_a_config_has_and_published_under_the_familys_own(moe_type):
    family = MOE_FAMILIES[moe_type]
    config = AutoConfig.for_model(moe_type, num_local_experts=6, **{family.expert_size_key: 20})
    for spelled in (config, config.to_dict(), as_published(config.to_dict())):
        assert (num_experts(spelled), expert_size(spelled)) == (6, 20)
    published = as_published(config.to_dict())
    assert published[family.experts_key] == 6
    assert [key for key in published if key in ("num_experts", "num_local_experts")] == [family.experts_key]


def test_a_dense_config_has_no_experts_and_is_published_as_it_is():
    for family in DENSE_FAMILIES:
        assert num_experts(tiny_config(family)) is None
        assert num_experts(tiny_config(family).to_dict()) is None
    assert as_published(PLAIN) == PLAIN


def test_every_family_has_a_preset_of_autoep_that_reads_its_number_of_experts():
    from deepspeed.module_inject.auto_ep_config import PRESET_MODELS

    for moe_type, preset in AUTOEP_PRESETS.items():
        assert moe_type in PRESET_MODELS[preset].hf_model_types
        config = AutoConfig.for_model(moe_type, num_local_experts=6)
        assert getattr(config, PRESET_MODELS[preset].num_experts_attr) == 6


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {"sliding_window": 7}, None),  # Llama does not read it, Mixtral would
        ("mistral", {"sliding_window": 7}, 7),
        ("mistral", {"sliding_window": None}, None),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 7}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, None),
    ],
)
def test_the_window_is_what_the_dense_model_does(family, settings, window):
    assert AutoConfig.for_model(**fused(family, **settings)).sliding_window == window


def test_a_window_that_only_some_layers_have_is_refused():
    with pytest.raises(DataError) as caught:
        fused("qwen3", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    assert "layer_types: 1 of 2 layers have a sliding window" in str(caught.value)


def test_the_moe_config_keeps_what_the_base_says():
    config = moe_config(PLAIN, MAP, top_k=2)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (MAP.num_experts, 2)
    assert (config["rope_theta"], config["sliding_window"]) == (5e5, None)
    assert ExpertMap.from_config(config) == MAP


@pytest.mark.parametrize(
    ("change", "top_k", "said"),
    [
        ({"model_type": "gpt2"}, 1, f"model_type 'gpt2' cannot become experts (works: {', '.join(FAMILIES)})"),
        ({"attention_bias": True}, 1, "attention_bias is on"),
        ({"mlp_bias": True}, 1, "mlp_bias is on"),
        ({}, 6, "top_k: 6 of 5 experts (works: 1 to 5)"),
        ({}, 0, "top_k: 0 of 5 experts"),
    ],
)
def test_what_the_fused_family_cannot_hold_is_refused(change, top_k, said):
    with pytest.raises(DataError) as caught:
        moe_config({**PLAIN, **change}, MAP, top_k)
    assert said in str(caught.value)
