"""The expert map: its rules, and that the model's config carries it."""

import pytest
from transformers import AutoConfig, MixtralConfig

from h3scale.errors import DataError
from h3scale.model.experts import CONFIG_KEY, ExpertMap
from h3scale.model.families import moe_config

PLAIN = {"model_type": "llama", "hidden_size": 32, "rope_theta": 5e5}


def test_the_order_of_alignments_is_kept_apart_from_the_order_of_experts():
    expert_map = ExpertMap(("honest", "helpful"), ("helpful", None, "honest", "helpful"))
    assert expert_map.num_experts == 4
    assert expert_map.labelled == [0, 2, 3]
    assert expert_map.experts_of("helpful") == [0, 3]
    assert expert_map.names() == ["helpful", "general", "honest", "helpful 2"]


def test_all_mistakes_are_told_at_once():
    with pytest.raises(DataError) as caught:
        ExpertMap(("a", "b", "a"), ("a", "c", None))
    text = str(caught.value)
    assert "expert 1: unknown alignment 'c'" in text
    assert "alignment 'b' has no expert" in text
    assert "named twice" in text


def test_the_map_comes_back_from_a_saved_config(tmp_path):
    expert_map = ExpertMap(("b", "a"), ("b", "a", None))
    MixtralConfig(**{CONFIG_KEY: expert_map.to_config()}).save_pretrained(tmp_path)
    assert ExpertMap.from_config(AutoConfig.from_pretrained(tmp_path)) == expert_map
    assert ExpertMap.from_config({CONFIG_KEY: expert_map.to_config()}) == expert_map


def test_a_model_without_a_map_has_none():
    assert ExpertMap.from_config(MixtralConfig()) is None
    assert ExpertMap.from_config({"model_type": "mixtral"}) is None


def test_the_moe_config_keeps_what_the_base_says():
    config = moe_config(PLAIN, ExpertMap(("a", "b"), ("a", "b", None)), top_k=2)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
    assert (config["rope_theta"], config["sliding_window"]) == (5e5, None)
    assert ExpertMap.from_config(config) == ExpertMap(("a", "b"), ("a", "b", None))


@pytest.mark.parametrize(
    ("change", "top_k", "said"),
    [
        ({"model_type": "gpt2"}, 1, "model_type 'gpt2' cannot become experts (works: llama, mistral)"),
        ({"attention_bias": True}, 1, "attention_bias is on"),
        ({"mlp_bias": True}, 1, "mlp_bias is on"),
        ({}, 3, "top_k: 3 of 2 experts (works: 1 to 2)"),
        ({}, 0, "top_k: 0 of 2 experts"),
    ],
)
def test_what_mixtral_cannot_hold_is_refused(change, top_k, said):
    with pytest.raises(DataError) as caught:
        moe_config({**PLAIN, **change}, ExpertMap(("a", "b"), ("a", "b")), top_k)
    assert said in str(caught.value)
