"""Operations from a config, against those that torch counts while it computes."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from h3scale.config.recipe import Lora
from h3scale.model.flops import active_parameters, attended_pairs, training_flops
from h3scale.model.lora import add_lora
from h3scale.model.trainable import freeze
from tests.tiny import tiny_config

SIZES = tiny_config().to_dict()


def moe() -> MixtralForCausalLM:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = MixtralConfig(
        **{key: SIZES[key] for key in kept}, num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=2, sliding_window=None
    )
    return MixtralForCausalLM(config)


def dense() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_config())


def wide_heads() -> Qwen3ForCausalLM:
    """Heads that are wider together than the hidden size, which only `head_dim` tells."""
    kept = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    return Qwen3ForCausalLM(Qwen3Config(**kept, num_hidden_layers=2, num_key_value_heads=2, head_dim=20))


def counted(model: torch.nn.Module, rows: int, length: int) -> int:
    """Matrix products of one forward and backward, without those of the rotary angles. Eager: all pairs."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.set_experts_implementation("eager")  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(rows * length).view(rows, length) % SIZES["vocab_size"]
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    angles = sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize(
    ("make", "trainable"),
    [
        (dense, ["all"]),
        (dense, ["ffn"]),
        (dense, ["norms"]),
        (dense, ["embeddings"]),
        (wide_heads, ["all"]),
        (wide_heads, ["attention"]),
        (moe, ["all"]),
        (moe, ["experts", "router"]),
        (moe, ["ffn"]),
        (moe, ["router"]),
        (moe, ["attention", "router"]),
    ],
)
def test_flops_are_what_torch_counts_whatever_is_frozen(make, trainable: list[str]) -> None:
    model = make()
    freeze(model, trainable)
    rows, length = 2, 8
    expected = training_flops(model.config, trainable).of(rows * length, rows * length * length)
    assert counted(model, rows, length) == expected


def test_all_trained_costs_six_operations_an_active_parameter() -> None:
    config = moe().config
    assert training_flops(config, ["all"]).per_token == 6 * active_parameters(config)


def test_active_parameters_are_the_matrices_of_a_model_with_as_many_experts_as_a_token_takes() -> None:
    config = moe().config
    taken = MixtralConfig(**{**config.to_dict(), "num_local_experts": config.num_experts_per_tok})
    matrices = [(n, p) for n, p in MixtralForCausalLM(taken).named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    rest_of_router = (config.num_local_experts - config.num_experts_per_tok) * config.hidden_size * config.num_hidden_layers
    assert active_parameters(config) == sum(p.numel() for _, p in matrices) + rest_of_router


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attended_pairs_are_the_ones_in_the_mask(window: int | None) -> None:
    lengths = np.array([1, 2, 5, 9], np.int32)
    pairs = 0
    for n in lengths.tolist():
        query, key = torch.arange(n)[:, None], torch.arange(n)[None]
        pairs += int(((key <= query) & (query - key < (window or n))).sum())
    assert attended_pairs(lengths, window) == pairs


@pytest.mark.parametrize("targets", [["attention"], ["ffn"], ["attention", "ffn"]])
def test_flops_of_low_rank_updates_are_those_of_the_frozen_model_with_gradients_that_reach_them(targets: list[str]) -> None:
    rows, length = 2, 24
    by_rank = []
    for rank in (1, 2):
        model = dense()
        add_lora(model, Lora(rank=rank, targets=targets))
        freeze(model, [])
        by_rank.append(counted(model, rows, length))
    without_updates = 2 * by_rank[0] - by_rank[1]  # theirs are proportional to the rank
    flops = training_flops(model.config, [], targets)
    assert flops.of(rows * length, rows * length * length) == without_updates
