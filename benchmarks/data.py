"""The data pipeline beside what others use: python benchmarks/data.py [--data DIR] [--tiny] [--only NAME,...] [--out FILE].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch and tokenizers start threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from measure import Row, machine, print_table, versions

if TYPE_CHECKING:
    from data_corpus import Corpus

# Functions by name: the processes that `prepare` starts import this file too, and should not pay for all of these modules.
SUBJECTS = {
    "waste": "data_mixing:waste",
    "shares": "data_mixing:shares",
    "packed_tokens_per_s": "data_speed:packed_tokens",
    "prepare": "data_speed:prepare_speed",
    "prepare_at_scale": "data_speed:prepare_at_scale",
    "planner": "data_speed:planner",
}
LARGE = ("memory", "resume")  # one run gives both
PACKAGES = ("torch", "numpy", "datasets", "tokenizers", "transformers", "trl", "streaming-community")


def main() -> None:
    import torch
    from data_corpus import corpus

    words = _words()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-"))
    result: Row = {"command": _command(words), "machine": machine(), "versions": versions(PACKAGES), "corpus": {}, "subjects": {}}
    try:
        records = corpus(words.data, words.tiny, work)
        result["corpus"] = records.about
        for name in words.only:
            _run(name, records, words.tiny, work, result["subjects"])
    finally:
        shutil.rmtree(work)
    result["machine"]["load_average_at_end"] = machine()["load_average"]
    if words.out:
        words.out.parent.mkdir(parents=True, exist_ok=True)
        words.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {words.out}")


def _run(name: str, records: "Corpus", tiny: bool, work: Path, found: dict[str, Row]) -> None:
    """Runs a subject and prints its table; `resume` is found by `memory`."""
    if name in found:
        return
    began, load = time.perf_counter(), os.getloadavg()[0]
    if name in LARGE:
        subjects = dict(zip(LARGE, resolve_name("data_memory:memory")(tiny, work), strict=True))
    else:
        subjects = {name: resolve_name(SUBJECTS[name])(records, tiny)}
    about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
    for subject, rows in subjects.items():
        found[subject] = {**about, "rows": rows}
        print_table(subject, rows, about)


def _words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with helpful.jsonl, harmless.jsonl, honest.jsonl (default: built-in)")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, to see that everything works")
    parser.add_argument("--only", default=",".join([*SUBJECTS, *LARGE]), help="subjects, by comma (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    words = parser.parse_args()
    words.only = words.only.split(",")
    wrong = [name for name in words.only if name not in (*SUBJECTS, *LARGE)]
    if wrong:
        parser.error(f"--only: '{wrong[0]}' is no subject (works: {', '.join([*SUBJECTS, *LARGE])})")
    return words


def _command(words: argparse.Namespace) -> str:
    """As it was given, with file names only: results are read on other machines."""
    given = ["python", "benchmarks/data.py", *sys.argv[1:]]
    for path in (words.data, words.out):
        given = [word.replace(str(path), path.name) for word in given] if path else given
    return " ".join(given)


if __name__ == "__main__":
    main()
