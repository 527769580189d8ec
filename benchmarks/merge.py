"""Merging beside mergekit, full SVDs and cp: python benchmarks/merge.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name

from measure import ROOT, Row, command_line, machine, print_table, subjects_of, versions, write_result
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
    parser.add_argument("--work", type=Path, help="folder on the disk that is used (default: the system's for temporary files)")
    parser.add_argument(
        "--mergekit", type=Path, default=MERGEKIT, help="python of mergekit's own environment (default: peers/mergekit)"
    )
    parser.add_argument("--size", choices=SIZES, default="0.17 B", help="of the models (default: %(default)s)")
    words = subjects_of(parser, SUBJECTS)
    size = "tiny" if words.tiny else words.size
    peer = words.mergekit if words.mergekit.is_file() else None
    result: Row = {"command": command_line("merge.py", (words.out, words.work, words.mergekit)), "machine": machine()}
    result |= {"versions": versions(PACKAGES), "subjects": {}}
    for name in words.only:
        result["subjects"][name] = _run(name, size, words.work, peer)
    for subject in result["subjects"].values():
        result["versions"] |= subject.pop("versions", {})
    if words.out:
        write_result(words.out, result)


def _run(name: str, size: str, where: Path | None, peer: Path | None) -> Row:
    """Runs a subject in a folder of its own, which is deleted, and prints its table."""
    work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-", dir=where))
    began, load = time.perf_counter(), os.getloadavg()[0]
    try:
        found = resolve_name(SUBJECTS[name])(size, work, peer)
    finally:
        shutil.rmtree(work)
    about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
    print_table(name, found["rows"], about)
    return {**about, **found}


if __name__ == "__main__":
    main()
