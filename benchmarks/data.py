"""The data pipeline beside what others use: python benchmarks/data.py [--data DIR] [--tiny] [--only NAME,...] [--out FILE].

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
from typing import TYPE_CHECKING

from measure import Row, command_line, machine, print_table, subjects_of, versions, write_result

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
    result: Row = {
        "command": command_line("data.py", (words.data, words.out)),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    result |= {"corpus": {}, "subjects": {}}
    try:
        records = corpus(words.data, words.tiny, work)
        result["corpus"] = records.about
        for name in words.only:
            _run(name, records, words.tiny, work, result["subjects"])
            if words.out:
                write_result(words.out, result)
    finally:
        shutil.rmtree(work)
    if words.out:
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
    return subjects_of(parser, [*SUBJECTS, *LARGE])


if __name__ == "__main__":
    main()
