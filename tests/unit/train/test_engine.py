"""What the engine is given: parameter groups, their learning rates, an environment."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from h3scale.config.base import load_recipe
from h3scale.config.recipe import Optimizer, TrainRecipe
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap
from h3scale.train.engine import _quiet, learning_rates, start
from tests.tiny import tiny_tokenizer


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the packages may be installed beside a GPU")
@pytest.mark.parametrize(
    ("experts", "family", "size", "said"),
    [
        ("megablocks", "mixtral", 24, r"experts: megablocks: .*not installed \(works: make megablocks; auto\)"),
        ("grouped_mm", "mixtral", 22, r"experts: grouped_mm needs widths .* 16 and 22 \(works: loop, auto\)"),
        ("grouped_mm", "qwen3_moe", 22, r"experts: grouped_mm needs widths .* 16 and 22 \(works: loop, auto\)"),
    ],
)
def test_a_backend_that_cannot_be_had_is_told_before_anything_is_loaded(
    experts: str, family: str, size: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    names = ("helpful", "harmless", "honest")
    config = {"model_type": family, "hidden_size": 16, "num_hidden_layers": 2, "h3scale": ExpertMap(names, names).to_config()}
    config |= {"num_local_experts": 3, "intermediate_size": size} if family == "mixtral" else {"num_experts": 3}
    config |= {"moe_intermediate_size": size} if family == "qwen3_moe" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: pytest.fail("was started"))
    recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", [f"model={tmp_path}", f"experts={experts}", "ep_size=1"])
    with pytest.raises(ConfigError, match=f"^{said}$"):
        start(recipe, "train.yaml")
