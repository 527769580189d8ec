"""The expert map: its rules, and that the model's config carries it."""

import pytest
from transformers import AutoConfig, MixtralConfig

from h3scale.errors import DataError
from h3scale.model.experts import CONFIG_KEY, ExpertMap


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


def test_experts_of_an_alignment_stand_together_and_general_ones_last():
    expert_map = ExpertMap.of(("b", "a"), 2, 1)
    assert expert_map == ExpertMap(("b", "a"), ("b", "b", "a", "a", None))
    assert expert_map.names() == ["b", "b 2", "a", "a 2", "general"]


def test_names_are_unique_whatever_alignments_are_called():
    names = ExpertMap.of(("helpful", "helpful 2", "general"), 2, 2).names()
    assert names == ["helpful", "helpful 3", "helpful 2", "helpful 2 2", "general", "general 2", "general 3", "general 4"]
