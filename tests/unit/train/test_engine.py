"""What the engine is given: parameter groups, their learning rates, an environment."""

import subprocess
from typing import Any

import pytest
import torch

from h3scale.config.recipe import Optimizer
from h3scale.errors import ConfigError
from h3scale.train.engine import _quiet, learning_rates


def optimizer(**rates: Any) -> Optimizer:
    return Optimizer(learning_rate=1e-3, learning_rates=rates)


def test_groups_have_their_own_learning_rates() -> None:
    assert learning_rates(optimizer(router=1e-2, experts=0.0), {"router", "experts"}) == {"router": 1e-2, "experts": 0.0}


def test_ffn_means_the_experts_of_a_fused_model() -> None:
    assert learning_rates(optimizer(ffn=1e-4), {"router", "experts"}) == {"experts": 1e-4, "router": 1e-3}
    assert learning_rates(optimizer(ffn=1e-4), {"ffn", "attention"}) == {"ffn": 1e-4, "attention": 1e-3}


def test_a_learning_rate_of_what_is_frozen_is_a_finding() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.learning_rates: 'attention' is not trained .works: experts, router."):
        learning_rates(optimizer(attention=1e-4), {"router", "experts"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts devices of a CPU")
def test_deepspeed_counts_the_ranks_of_a_machine_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    def refuse(*words: Any, **_: Any) -> Any:
        raise AssertionError(f"started {words}")

    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(subprocess, "check_output", refuse)
    _quiet()
    assert CPU_Accelerator().device_count() == 3
