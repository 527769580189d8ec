"""Merging beside mergekit, full SVDs and cp: python benchmarks/merge.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from pathlib import Path
from pkgutil import resolve_name

from measure import ROOT, run_subjects, subjects_of
from merge_models import SIZES

SUBJECTS = {
    "streamed": "merge_streamed:streamed",
    "adapters": "merge_streamed:adapters",
    "memory": "merge_streamed:memory",
    "spectral": "merge_spectral:spectral",
    "oracle": "merge_spectral:oracle",
}
PACKAGES = ("torch", "safetensors", "numpy")
MERGEKIT = ROOT / "peers" / "mergekit" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--mergekit", type=Path, default=MERGEKIT, help="python of mergekit's own environment (default: peers/mergekit)"
    )
    parser.add_argument("--size", choices=SIZES, default="0.17 B", help="of the models (default: %(default)s)")
    words = subjects_of(parser, SUBJECTS, on_disk=True)
    size = "tiny" if words.tiny else words.size
    peer = words.mergekit if words.mergekit.is_file() else None
    run_subjects("merge.py", words, PACKAGES, lambda name, work: resolve_name(SUBJECTS[name])(size, work, peer))


if __name__ == "__main__":
    main()
