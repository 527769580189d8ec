"""How memory is taken from the system and given back while a model starts."""

import subprocess
import sys

import pytest

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
    assert taken < 5 * pages, "the system gives the same memory anew, every time"
