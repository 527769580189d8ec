"""What surrounds the steps of a run."""

import json
import logging
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import ConfigError
from h3scale.train import loop
from h3scale.train.metrics import Metrics
from h3scale.train.stop import Asked


def training(metrics: Metrics, recipe: TrainRecipe) -> Any:
    engine = SimpleNamespace(device=torch.device("cpu"), zero_offload_optimizer=lambda: None, train=lambda: None)
    run = SimpleNamespace(rank=0, engine=engine, expert_map=None, world_size=1, ep_size=1, zero_stage=3)
    return SimpleNamespace(recipe=recipe, run=run, held_out=True, loader=None, metrics=metrics, first_step=0, resumed=False)


def test_memory_that_runs_out_in_the_evaluation_before_the_first_step_is_one_line(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "score", full)
    words = ["evaluation={records: [heldout.jsonl], every: 1, at_start: true}"]
    recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", words)
    with pytest.raises(ConfigError, match=r"^evaluation: out of memory on rank 0 "):
        loop.steps_of_run(training(Metrics(tmp_path / "metrics.jsonl", [], torch.device("cpu")), recipe), Asked(tmp_path, 0))


def test_a_held_out_figure_that_is_not_finite_is_said_and_not_written(
    one_rank: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("h3scale"), "propagate", True)
    metrics = Metrics(tmp_path / "metrics.jsonl", [], torch.device("cpu"))
    metrics.held_out(3, {"heldout/lm": math.nan, "heldout/lm/honest": math.inf, "heldout/lm/helpful": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 3,
        "heldout/lm/helpful": 1.5,
    }
    assert caplog.messages == ["step 3: heldout/lm is nan", "step 3: heldout/lm/honest is inf"]


def test_a_signal_during_the_last_save_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> Path:
        os.kill(os.getpid(), signal.SIGUSR2)
        return tmp_path / "x"

    steps = SimpleNamespace(run=SimpleNamespace(rank=0), metrics=SimpleNamespace(close=lambda: None))
    steps.skips, steps.keeper = SimpleNamespace(too_many=False), SimpleNamespace(finish=finish)
    monkeypatch.setattr(loop, "begin", lambda *_: steps)
    monkeypatch.setattr(loop, "steps_of_run", lambda *_: None)
    before = signal.signal(signal.SIGUSR2, lambda *_: pytest.fail("would have ended the rank"))
    try:
        recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", [f"out={tmp_path / 'x'}"])
        assert loop.train(recipe, "recipe.yaml") == tmp_path / "x"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_run_that_goes_on_after_step_0_does_not_score_its_start_twice(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluation={records: [heldout.jsonl], every: 1, at_start: true}"]
    recipe = load_recipe(TrainRecipe, "recipes/demo/train.yaml", words).model_copy(update={"steps": 0})
    scored: list[int] = []
    monkeypatch.setattr(loop, "evaluate", lambda _, step: scored.append(step))
    for resumed in (False, True):
        t = training(Metrics(Path("never"), [], torch.device("cpu")), recipe)
        t.resumed = resumed
        loop.steps_of_run(t, Asked(Path("never"), 0))
    assert scored == [0]
