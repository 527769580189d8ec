"""What is memory running out, and what to do about it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError
from h3scale.model.experts import ExpertMap
from h3scale.train.dry_run import is_out_of_memory, out_of_memory_told, remedies


def recipe(*overrides: str) -> TrainRecipe:
    return load_recipe(TrainRecipe, "recipes/demo/train.yaml", list(overrides))


def run(**changes: Any) -> Any:
    engine = SimpleNamespace(device=torch.device("cpu"), zero_offload_optimizer=lambda: None)
    values = {"engine": engine, "expert_map": None, "world_size": 4, "ep_size": 1, "zero_stage": 3, "rank": 2}
    return SimpleNamespace(**values | changes)


def test_what_torch_says_when_memory_is_used_up_is_known() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    for said in (
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "NCCL error ... Last error:\nCuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(said))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_that_runs_out_is_one_line_and_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ConfigError) as caught, out_of_memory_told(recipe("rows_per_micro_batch=2"), run(), "dry run"):
        torch.empty(2**60)
    (line,) = caught.value.findings
    assert "\n" not in line
    assert line.startswith("dry run: out of memory on rank 2 with micro-batches of 2 x ")
    assert "works: rows_per_micro_batch: 1, activation_checkpointing: true, " in line
    assert caught.value.exit_code == 78
    with pytest.raises(RuntimeError, match="another"), out_of_memory_told(recipe(), run(), "dry run"):
        raise RuntimeError("another")


def test_only_what_has_not_been_done_is_advised() -> None:
    done = recipe("rows_per_micro_batch=1", "activation_checkpointing=true", "data.sequence_length=64")
    assert remedies(done, run()) == ["a data.sequence_length below 64", "more ranks"]
    experts = ExpertMap.of(("helpful", "harmless"), 2, 0)
    assert "ep_size: 2" in remedies(done, run(expert_map=experts))
    assert not any("ep_size" in advice for advice in remedies(done, run(expert_map=experts, ep_size=4)))
    assert "ZeRO stage 3 in the ds_config" in remedies(done, run(zero_stage=2))
    assert remedies(recipe("rows_per_micro_batch=4"), run())[0] == "rows_per_micro_batch: 2"
