"""What saving costs a run, and what a kill costs it: python benchmarks/resume.py [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name

from measure import Row, command_line, machine, print_table, subjects_of, versions, write_result

SUBJECTS = {name: f"resume_runs:{name}" for name in ("save", "kills")}
PACKAGES = ("torch", "transformers", "deepspeed", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder on the disk that is measured (default: the system's for temporary files)")
    words = subjects_of(parser, SUBJECTS)
    result: Row = {"command": command_line("resume.py", (words.out, words.work)), "machine": machine()}
    result |= {"versions": versions(PACKAGES), "subjects": {}}
    for name in words.only:
        work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-", dir=words.work))
        began, load = time.perf_counter(), os.getloadavg()[0]
        try:
            rows = resolve_name(SUBJECTS[name])(words.tiny, work)
        finally:
            shutil.rmtree(work)
        about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
        print_table(name, rows, about)
        result["subjects"][name] = {**about, "rows": rows}
    if words.out:
        write_result(words.out, result)


if __name__ == "__main__":
    main()
