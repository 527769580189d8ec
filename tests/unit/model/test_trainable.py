"""Freezing by group: the same words in dense and mixture-of-experts models."""

import pytest
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from h3scale.errors import ConfigError
from h3scale.model.trainable import freeze, group_of, what_is_trained
from tests.tiny import tiny_config


def moe() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    return MixtralForCausalLM(config)


def trained(model: LlamaForCausalLM | MixtralForCausalLM) -> set[str]:
    return {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_ffn_is_the_experts_of_a_mixture() -> None:
    dense, mixture = LlamaForCausalLM(tiny_config()), moe()
    freeze(dense, ["ffn"])
    assert trained(dense) == {"ffn"}
    freeze(mixture, ["ffn", "router"])
    assert trained(mixture) == {"experts", "router"}


def test_what_is_trained_and_frozen_is_told_with_numbers_and_rates() -> None:
    model = moe()
    freeze(model, ["router", "experts"])
    numel = {True: 0, False: 0}
    for parameter in model.parameters():
        numel[parameter.requires_grad] += parameter.numel()
    found = what_is_trained(model, {"router": 1e-2})
    router = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n)
    assert found[0].startswith("trained: ")
    assert f"router {router:,} (lr 0.01)" in found[0]
    assert found[0].endswith(f"; {numel[True]:,} parameters")
    assert found[1].startswith("frozen: embeddings ")
    assert found[1].endswith(f"; {numel[False]:,} parameters")


def test_freezing_again_forgets_what_was_trained_before() -> None:
    model = moe()
    freeze(model, ["all"])
    freeze(model, ["router"])
    assert trained(model) == {"router"}


def test_every_parameter_has_a_group() -> None:
    for model in (LlamaForCausalLM(tiny_config()), moe()):
        assert "other" not in {group_of(name) for name, _ in model.named_parameters()}


def test_a_dense_model_has_no_router() -> None:
    with pytest.raises(ConfigError, match="trainable: 'router': the model has none"):
        freeze(LlamaForCausalLM(tiny_config()), ["router"])
