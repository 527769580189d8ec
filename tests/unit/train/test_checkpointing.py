"""Why activation checkpoints are not reentrant: the router's logits are recorded on the way, and must keep their graph."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM


@pytest.mark.parametrize("reentrant", [False, True])
def test_recorded_router_logits_reach_the_router_unless_checkpoints_are_reentrant(reentrant: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(vocab_size=11, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = MixtralForCausalLM(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    output = model(input_ids=torch.arange(11)[None], use_cache=False, output_router_logits=True)
    assert len(output.router_logits) == config.num_hidden_layers
    assert [logits.requires_grad for logits in output.router_logits] == [not reentrant] * config.num_hidden_layers
