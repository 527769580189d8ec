"""A suite on model folders: in one process or several, interrupted and gone on with."""

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from h3scale.checkpoint.shards import ModelFolder
from h3scale.config.suite import Suite
from h3scale.errors import PeerLostError
from h3scale.evaluation.evaluate import Options, open_model
from h3scale.evaluation.journal import Journal, kept
from h3scale.evaluation.routing import route_for
from h3scale.evaluation.score import longest
from h3scale.evaluation.suite import LoadedSuite, Unit, Work, result_of, score_unit, work_of
from h3scale.log import progress
from h3scale.model.experts import ExpertMap
from h3scale.model.start import load_tokenizer

Scored = Iterator[tuple[Unit, list[float]]]


@dataclass(frozen=True)
class Asking:
    """A model folder and how it is asked: `router` and `experts` as in evaluate.Options."""

    folder: Path
    router: str = "trained"
    experts: str = "auto"

    def key(self) -> str:
        """A hash of the model's files (names, sizes, times of change) and of how it is asked."""
        stats = [(path.name, path.stat()) for path in sorted(self.folder.iterdir()) if path.is_file()]
        known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr((known, self.router, self.experts)).encode()).hexdigest()[:16]


def evaluate_suite(
    loaded: LoadedSuite,
    models: Mapping[str, Path],
    *,
    router: str = "trained",
    experts: str = "auto",
    processes: int = 1,
    journal: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The result (see suite.result_of) of each model folder, by name.

    `journal`: a folder that remembers what is scored; the same call goes on there, with any number of `processes`, and ends with
    the same bits as if it had not been interrupted. A model whose files have changed is scored anew. Each process has a model
    of its own, on a GPU of its own as far as there are some. Raises PeerLostError (69) when a process is killed, and what
    `open_model`, `work_of` and `route_for` raise.
    """
    Options(router)  # refuses a mode that is none
    with kept(journal) as notes, _pool(processes) as pool:
        return {name: _evaluated(loaded, Asking(Path(model), router, experts), name, pool, notes) for name, model in models.items()}


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that stay for all models; None where this one is enough."""
    if processes == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(processes, context, _take_place, (context.Value("i", 0), processes)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _evaluated(
    loaded: LoadedSuite, asking: Asking, name: str, pool: ProcessPoolExecutor | None, journal: Journal
) -> dict[str, Any]:
    def scored(left: Sequence[Unit]) -> Scored:
        return _elsewhere(pool, asking, loaded.suite, left) if pool else _here(asking, loaded.suite, left)

    return finished(loaded, work_for(loaded, asking.folder), name, asking.key(), scored, journal)


def work_for(loaded: LoadedSuite, folder: Path) -> Work:
    """The suite as a model folder's tokenizer and length have it."""
    tokenizer = tokenizer_of(folder)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return work_of(tokenizer, loaded, longest(config))


def tokenizer_of(folder: Path) -> Any:
    """A model folder's tokenizer. Raises what ModelFolder does."""
    _ = ModelFolder(folder).specs  # its findings are clearer than transformers'
    return load_tokenizer(folder)


def finished(
    loaded: LoadedSuite, work: Work, name: str, known: str, score: Callable[[Sequence[Unit]], Scored], journal: Journal
) -> dict[str, Any]:
    """The result when all units are scored: by `score` those that the journal does not have of the model that is `known` there."""
    done = journal.read()
    left = [unit for unit in work.units if f"{known}-{unit.key}" not in done]
    if left:
        total = sum(len(unit.items) for unit in left)
        with progress(f"score {name}", total, "items") as bar, journal.writer() as writer:
            for unit, values in score(left):
                done[f"{known}-{unit.key}"] = values
                writer.add(f"{known}-{unit.key}", values)
                bar.advance(len(unit.items))
    return result_of(loaded, work, {unit.key: done[f"{known}-{unit.key}"] for unit in work.units})


def _here(asking: Asking, suite: Suite, units: Sequence[Unit]) -> Scored:
    scorer = _Scorer(asking, suite)
    for unit in units:
        yield unit, scorer.score(unit)


def _elsewhere(pool: ProcessPoolExecutor, asking: Asking, suite: Suite, units: Sequence[Unit]) -> Scored:
    scored = {pool.submit(_score, asking, suite, unit): unit for unit in units}
    try:
        for future in as_completed(scored):
            yield scored[future], future.result()
    except BrokenProcessPool:
        raise PeerLostError(f"{asking.folder}: a scoring process was killed (the same command goes on)") from None


class _Scorer:
    """A model that is open, and its route."""

    def __init__(self, asking: Asking, suite: Suite):
        self.suite = suite
        self.model, _ = open_model(asking.folder, asking.experts)
        expert_map = ExpertMap.from_config(self.model.config)
        self.alignments = expert_map.alignments if expert_map else ()
        asked = [task.alignment for task in suite.tasks.values() if task.alignment]
        self.route = route_for(self.model, expert_map, asking.router, asked)

    def score(self, unit: Unit) -> list[float]:
        return score_unit(self.model, unit, self.suite.tasks[unit.task], self.alignments, self.route)


def _take_place(taken: Any, processes: int) -> None:
    """In a new process: its share of the CPU's cores, and a GPU of its own as far as there are some."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with taken.get_lock():
        place = taken.value
        taken.value += 1
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


def _end_with_parent() -> None:
    """A worker of a pool whose parent was killed would wait for work, and hold its GPU's memory, for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(os.EX_UNAVAILABLE)


def _score(asking: Asking, suite: Suite, unit: Unit) -> list[float]:
    return _scorer_of(asking, suite.model_dump_json()).score(unit)


@lru_cache(1)
def _scorer_of(asking: Asking, suite: str) -> _Scorer:
    return _Scorer(asking, Suite.model_validate_json(suite))
