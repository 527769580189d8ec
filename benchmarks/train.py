"""The training engine beside what others use: python benchmarks/train.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch and tokenizers start threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
from pkgutil import resolve_name

from measure import run_subjects, subjects_of

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
    run_subjects("train.py", words, PACKAGES, lambda name, work: resolve_name(SUBJECTS[name])(words.tiny, work), {"device": device})


if __name__ == "__main__":
    main()
