"""The router's logits, and what transformers would make with them that nobody asked for."""

import sys
from types import SimpleNamespace

import pytest
import torch

from h3scale.errors import ConfigError
from h3scale.model.router_logits import with_router_logits
from tests.unit.checkpoint.layouts_reference import tiny_moe

IDS = torch.arange(10)[None]


@pytest.mark.parametrize("asked_by_config", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_they_are_those_of_transformers_whose_balancing_loss_is_not_made(
    family: str, asked_by_config: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_moe(family)
    wanted = model(input_ids=IDS, output_router_logits=True)
    assert wanted.aux_loss is not None
    calls: list[int] = []
    monkeypatch.setattr(sys.modules[type(model).__module__], "load_balancing_loss_func", lambda *_: calls.append(1))
    model.config.output_router_logits = asked_by_config
    found = with_router_logits(model, model, input_ids=IDS)
    assert calls == []
    assert torch.equal(torch.stack(found.router_logits), torch.stack(wanted.router_logits))
    assert torch.equal(found.logits, wanted.logits)
    model.config.output_router_logits = False
    assert model(input_ids=IDS).router_logits is None  # asked for once


def test_nothing_stays_after_an_error_and_a_model_that_gives_none_is_refused_in_one_line() -> None:
    model = tiny_moe()
    with pytest.raises(ValueError, match="input_ids"):
        with_router_logits(model, model)
    assert model(input_ids=IDS).router_logits is None
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM does not give the router logits .*works: transformers=="):
        with_router_logits(lambda **_: SimpleNamespace(router_logits=None), model)
