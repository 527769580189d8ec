"""The training engine beside what others use: python benchmarks/train.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch and tokenizers start threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name

from measure import Row, command_line, machine, print_table, subjects_of, versions, write_result

SUBJECTS = {
    "start_memory": "train_memory:start_memory",
    "speed": "train_speed:speed",
    "overhead": "train_overhead:overhead",
}
PACKAGES = ("torch", "numpy", "transformers", "deepspeed", "accelerate", "safetensors", "tensorboardX")


def main() -> None:
    import torch

    words = subjects_of(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]), SUBJECTS)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "cpu"
        os.environ.setdefault("DS_ACCELERATOR", device)
    result: Row = {"command": command_line("train.py", (words.out,)), "machine": {**machine(), "device": device}}
    result |= {"versions": versions(PACKAGES), "subjects": {}}
    for name in words.only:
        result["subjects"][name] = _run(name, words.tiny)
    if words.out:
        write_result(words.out, result)


def _run(name: str, tiny: bool) -> Row:
    """Runs a subject in a folder of its own, which is deleted, and prints its table."""
    work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-"))
    began, load = time.perf_counter(), os.getloadavg()[0]
    try:
        rows = resolve_name(SUBJECTS[name])(tiny, work)
    finally:
        shutil.rmtree(work)
    about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
    print_table(name, rows, about)
    return {**about, "rows": rows}


if __name__ == "__main__":
    main()
