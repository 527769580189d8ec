"""How a model starts: memory taken from the system and given back, and what is said of weights that lose by it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from h3scale.checkpoint.shards import ModelFolder
from h3scale.model.trainable import freeze
from h3scale.train.load import rounding
from tests.tiny import tiny_llama

FAULTS = """
import resource
import torch
from h3scale.train.load import freed_memory_returned

with freed_memory_returned():
    torch.ones(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    values = torch.ones(2**21)
    size = values.nbytes
    del values
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, size // resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_of_a_step_is_used_again_after_the_start() -> None:
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    taken, pages = (int(number) for number in said.split())
    assert taken < 10 * pages, "the system gives the same memory anew, every time"


def test_frozen_weights_that_bf16_cannot_hold_are_a_warning(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "half", dtype=torch.float16))
    half, exact = ModelFolder(tmp_path / "half"), ModelFolder(tiny_llama(tmp_path / "bf16", dtype=torch.bfloat16))
    assert rounding(half, model, torch.bfloat16) is None, "all weights are trained and have masters"
    freeze(model, ["ffn"])
    assert "has float16 weights" in (rounding(half, model, torch.bfloat16) or "")
    assert rounding(half, model, torch.float32) is None
    assert rounding(exact, model, torch.bfloat16) is None
