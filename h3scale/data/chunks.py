"""A block of lines as a file of token ids and fingerprints: what one worker process makes, whole or not at all."""

import gc
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from h3scale.data.duplicates import digest, sign
from h3scale.data.encode import encode_block
from h3scale.data.heldout import Heldout
from h3scale.data.records import Record
from h3scale.data.sources import Block, parse_block

SMALL = 4_000  # lines: below that, other processes take longer to start than they save


@dataclass(frozen=True)
class Work:
    """What workers need to know. `heldout`: evaluation prompts, and the similarity from which a prompt is one of them."""

    tokenizer: Any
    alignments: Sequence[str] | None
    sign: bool
    heldout: Sequence[str]
    heldout_similarity: float


class Worker:
    """Makes chunks; one in each process."""

    def __init__(self, work: Work):
        self.work = work
        self.heldout = Heldout(work.heldout, work.heldout_similarity) if work.heldout else None

    def make(self, number: int, source: int, block: Block, path: Path) -> tuple[int, int, int]:
        """Writes the chunk of a block; gives its number, records and tokens."""
        parsed = parse_block(block)
        items = encode_block(self.work.tokenizer, parsed.records)
        findings = list(parsed.findings)
        kept: list[tuple[Record, int, np.ndarray]] = []
        for record, place, item in zip(parsed.records, parsed.places, items, strict=True):
            if self.work.alignments and record.alignment not in self.work.alignments:
                findings.append((place, f"unknown alignment '{record.alignment}' (works: {', '.join(self.work.alignments)})"))
            elif isinstance(item, str):
                findings.append((place, item))
            else:
                kept.append((record, place, item))
        records = [record for record, _, _ in kept]
        alignments = list(dict.fromkeys(record.alignment for record in records))
        texts = ["\n".join(turn["content"] for turn in record.messages) for record in records]  # what duplicates share
        about = {
            "source": source,
            "lines": len(block.lines),
            "checked": len(parsed.records) + len(parsed.findings),
            "filtered": parsed.filtered,
            "findings": sorted(findings),
            "alignments": alignments,
            "records": len(records),
        }
        arrays: dict[str, np.ndarray] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "tokens": np.concatenate([item for _, _, item in kept]) if kept else np.zeros(0, np.uint32),
            "lengths": np.array([len(item) for _, _, item in kept], np.int32),
            "places": np.array([place for _, place, _ in kept], np.int64),
            "labels": np.array([alignments.index(record.alignment) for record in records], np.int16),
            "ids": np.array([id_digest(record.id) for record in records], np.uint64),
            "leaks": np.array([self._leak(record) for record in records], np.int32),
        }
        if self.work.sign:
            arrays["digests"], arrays["signatures"] = sign(texts)
        else:
            arrays["digests"] = np.array([digest(text) for text in texts], np.uint64)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.rename(path)
        return number, len(records), len(arrays["tokens"])

    def _leak(self, record: Record) -> int:
        """The evaluation prompt that one of the record's user turns, or all of them together, are, or -1."""
        if self.heldout is None:
            return -1
        turns = [turn["content"] for turn in record.messages if turn["role"] == "user"]
        return max(self.heldout.leaks([*turns, "\n\n".join(turns)] if len(turns) > 1 else turns))


def id_digest(record_id: str) -> int:
    """64 bits of an id, exactly as it is written."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def make_chunks(
    jobs: Iterator[tuple[int, int, Block, Path]], work: Work, workers: int
) -> Iterator[tuple[Block, tuple[int, int, int]]]:
    """Makes all chunks, in this process or in several; gives each block as it is finished with (number, records, tokens).

    Few blocks are held at a time. Workers end when this process does, however it ends.
    """
    if workers == 1:
        worker = Worker(work)
        for number, source, block, path in jobs:
            yield block, worker.make(number, source, block, path)
        return
    # Not forked: this process may hold threads and process groups.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (work,)) as pool:
        running = {}
        for job in jobs:
            running[pool.submit(_work, *job)] = job[2]
            while len(running) >= 2 * workers:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        for future, block in list(running.items()):
            yield block, future.result()


_worker: Worker


def _begin(work: Work) -> None:
    global _worker
    gc.freeze()  # a full collection would visit all of PyTorch's objects each time
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would fight the other workers for the cores
    _worker = Worker(work)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes its end of the workers' queue, but they hold it open for each other and would wait for ever."""
    parent = parent_process()
    assert parent
    with suppress(OSError):
        parent.join()
    os._exit(1)


def _work(number: int, source: int, block: Block, path: Path) -> tuple[int, int, int]:
    return _worker.make(number, source, block, path)
