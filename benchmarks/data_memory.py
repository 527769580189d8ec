"""Memory and time of a large set of records: prepared, read once, and gone on with in the middle.

Each measurement is a process of its own (`python benchmarks/data_memory.py prepare|read|resume FOLDER ...`), so that what the
benchmark itself holds does not count; the last line it prints is its figures.
"""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_corpus import made_up_tokenizer, write_made_up
from measure import Row, own_memory_mib, peak_memory

from h3scale.config.data import Data
from h3scale.data.store import open_store

LENGTH, BATCH_ROWS = 2048, 16
WORKERS = 2
SEED = 0
RANKS = (1, 2, 4, 8, 16)


def memory(tiny: bool, work: Path) -> tuple[list[Row], list[Row]]:
    """(memory and time of preparing and of reading, seconds to go on) of two sizes, one ten times the other."""
    rows: list[Row] = []
    tokenizer = made_up_tokenizer(work, tiny)
    for count in (2_000,) if tiny else (100_000, 1_000_000):
        folder = work / f"made-up-{count}"
        folder.mkdir()
        write_made_up(folder / "records.jsonl", count)
        (folder / "tokenizer").symlink_to(tokenizer, target_is_directory=True)
        prepared, figures = _child("prepare", folder)
        rows.append({"what": "prepare", "records": count, **figures})
        read, figures = _child("read", folder)
        assert read["tokens"] <= prepared["tokens"]
        rows.append({"what": "read one epoch", "records": count, **figures})
    resumed, _ = _child("resume", folder, json.dumps(read["digests"]))
    return rows, [{"what": name, "records": count, **found} for name, found in resumed.items()]


def _child(what: str, folder: Path, *words: str) -> tuple[Any, Row]:
    command = [sys.executable, __file__, what, str(folder), *words]
    said, peaks = peak_memory(command, {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    result = json.loads(said.splitlines()[-1])
    return result["result"], {**result["figures"], **peaks}


def prepare_child(folder: Path) -> Row:
    from transformers import AutoTokenizer

    from h3scale.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    anon, rss = own_memory_mib()
    began = time.perf_counter()
    store = prepare(Data(records=[str(folder / "records.jsonl")], workers=WORKERS), tokenizer, folder / "prepared")
    seconds = time.perf_counter() - began
    tokens = int(store.starts[-1])
    store_mib = sum(file.stat().st_size for file in store.folder.iterdir()) / 2**20
    about = {"kept": len(store), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "store_mib": store_mib}
    return {"result": about, "figures": {**about, "before_anon_mib": anon, "before_rss_mib": rss}}


def read_child(folder: Path) -> Row:
    """One epoch of global batches as tensors. Each record comes once; the digests are for `resume` to compare."""
    import numpy as np

    from h3scale.data.loader import TypedLoader

    anon, rss = own_memory_mib()
    began = time.perf_counter()
    store = open_store(_store_folder(folder))
    steps = _steps(store)
    loader = TypedLoader(store, _data(), seed=SEED, steps=steps)
    planned = time.perf_counter() - began
    seen = np.zeros(len(store), np.uint8)
    tokens, digests = 0, {}
    began = time.perf_counter()
    for step in range(steps):
        batch = loader.batch(step)
        tensors = loader.tensors(batch.rows, 0)
        np.add.at(seen, batch.records, 1)
        tokens += loader.tokens_in(batch)
        if step in _places(steps):
            digests[str(step)] = _digest([tensors.input_ids, tensors.record_ids])
    seconds = time.perf_counter() - began
    assert seen.max() == 1, "a record came twice in one epoch"
    figures = {
        "kept": len(store),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "batches": steps,
        "first_plan_s": planned,
        "read_once": float(seen.mean()),
        "before_anon_mib": anon,
        "before_rss_mib": rss,
    }
    return {"result": {"tokens": tokens, "digests": digests}, "figures": figures}


def resume_child(folder: Path, digests: dict[str, str]) -> Row:
    """Seconds from nothing open to the tensors of a step; the same tensors as when all steps before it were read."""
    from h3scale.data.loader import TypedLoader, rows_of_rank

    found: dict[str, list[tuple[float, float, float]]] = {}
    steps = _steps(open_store(_store_folder(folder)))
    for again, (step, digest) in enumerate(list(digests.items()) * 5):
        began = time.perf_counter()
        store = open_store(_store_folder(folder))
        opened = time.perf_counter()
        loader = TypedLoader(store, _data(), seed=SEED, steps=steps)
        planned = time.perf_counter()
        batch = loader.batch(int(step))
        tensors = loader.tensors(batch.rows, 0)
        ended = time.perf_counter()
        assert _digest([tensors.input_ids, tensors.record_ids]) == digest, f"step {step} is another batch than before"
        for ranks in RANKS if again < len(digests) else ():
            parts = [row for rank in range(ranks) for part in rows_of_rank(batch, rank, ranks, 1) for row in part]
            assert sorted(map(id, parts)) == sorted(map(id, batch.rows)), f"{ranks} ranks do not share out step {step}"
        found.setdefault(step, []).append((opened - began, planned - opened, ended - planned))
    return {
        "result": {
            f"batch {step} of {steps}": {
                "rounds": len(times),
                "seconds_min": min(map(sum, times)),
                "seconds_median": statistics.median(map(sum, times)),
                **{name: min(parts) for name, parts in zip(("open_s", "plan_s", "batch_s"), zip(*times, strict=True), strict=True)},
            }
            for step, times in found.items()
        },
        "figures": {},
    }


def _data() -> Data:
    return Data(records=["made-up"], sequence_length=LENGTH, rows_per_batch=BATCH_ROWS, max_epochs=1)


def _steps(store: Any) -> int:
    """Global batches of one epoch. The last few rows are left to chance: alignments end a row apart."""
    return max(int(store.starts[-1] * 0.995) // (LENGTH * BATCH_ROWS), 1)


def _places(steps: int) -> set[int]:
    return {0, steps // 2, steps - 1}


def _store_folder(folder: Path) -> Path:
    (manifest,) = (folder / "prepared").glob("*/manifest.json")
    return manifest.parent


def _digest(tensors: Sequence[Any]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


if __name__ == "__main__":  # the workers that prepare import this file again
    what, place, *rest = sys.argv[1:]
    children = {"prepare": prepare_child, "read": read_child, "resume": lambda folder: resume_child(folder, json.loads(rest[0]))}
    print(json.dumps(children[what](Path(place))))
