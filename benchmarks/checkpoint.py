"""The checkpoint tools beside others and beside cp: python benchmarks/checkpoint.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import argparse
from pkgutil import resolve_name

from measure import run_subjects, subjects_of

SUBJECTS = {name: f"checkpoint_speed:{name}" for name in ("dense", "experts", "memory")}
PACKAGES = ("torch", "transformers", "deepspeed", "safetensors")


def main() -> None:
    words = subjects_of(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]), SUBJECTS, on_disk=True)
    run_subjects("checkpoint.py", words, PACKAGES, lambda name, work: resolve_name(SUBJECTS[name])(words.tiny, work))


if __name__ == "__main__":
    main()
