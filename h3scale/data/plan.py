"""The plan of a run: the rows of all its global batches, in memory or as a folder that is mapped."""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from h3scale.data.pages import sync
from h3scale.data.planner import Planner
from h3scale.errors import DataError
from h3scale.log import progress


@dataclass(frozen=True)
class Plan:
    """Record numbers of all rows one after the other, (R,) uint32, and where each row begins, (rows + 1,) int64."""

    records: np.ndarray
    row_starts: np.ndarray
    ended: list[tuple[int, str]]
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the folder itself, if there is one."""
        if self.folder:
            return open_plan, (self.folder.parent, int(self.folder.name))
        return Plan, (self.records, self.row_starts, self.ended)

    def rows(self, first: int, count: int) -> list[np.ndarray]:
        """Some rows from a number on."""
        starts = self.row_starts[first : first + count + 1].tolist()
        return [self.records[begin:end] for begin, end in pairwise(starts)]

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


def make_plan(planner: Planner, rows_per_batch: int, steps: int, folder: Path | None = None) -> Plan:
    """The first `steps` global batches, or fewer when every alignment has reached its last epoch.

    With a folder the plan is written into it (so that it grows on disk, not in memory), whole or not at all, and mapped.
    """
    if folder is None:
        parts: list[np.ndarray] = []
        starts = _planned(planner, rows_per_batch, steps, lambda part: parts.append(part.astype(np.uint32)))
        return Plan(np.concatenate(parts) if parts else np.zeros(0, np.uint32), starts, planner.ended)
    partial = folder / f".partial-{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        with (partial / "records.u32").open("wb") as file:
            starts = _planned(planner, rows_per_batch, steps, lambda part: file.write(part.astype("<u4").tobytes()))
        np.save(partial / "row_starts.npy", starts)
        (partial / "plan.json").write_text(json.dumps({"ended": planner.ended}) + "\n", encoding="utf-8")
        sync(partial)
        if not (folder / str(steps)).exists():  # else another process has just made the same
            partial.rename(folder / str(steps))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    plan = open_plan(folder, steps)
    assert plan
    return plan


def _planned(planner: Planner, rows_per_batch: int, steps: int, keep: Any) -> np.ndarray:
    sizes: list[np.ndarray] = []
    with progress("plan", steps, "steps") as bar:
        for _, rows in zip(range(steps), planner.batches(rows_per_batch), strict=False):
            sizes.append(np.array([len(row) for row in rows]))
            keep(np.concatenate(rows))
            bar.advance()
    return np.cumsum(np.concatenate([[0], *sizes]))


def open_plan(folder: Path, steps: int) -> Plan | None:
    """Maps the shortest written plan of so many steps or more; None when there is none."""
    made = sorted(int(path.name) for path in folder.glob("[0-9]*")) if folder.is_dir() else []
    enough = next((count for count in made if count >= steps), None)
    if enough is None:
        return None
    folder = folder / str(enough)
    about = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    path = folder / "records.u32"
    records = np.asarray(np.memmap(path, "<u4", "r")) if path.stat().st_size else np.zeros(0, np.uint32)
    starts = np.load(folder / "row_starts.npy")
    if len(records) != starts[-1]:
        raise DataError(f"{folder}: damaged, {len(records):,} of {starts[-1]:,} records (works: delete this folder)")
    return Plan(records, starts, [(step, name) for step, name in about["ended"]], folder)


def plan_key(*settings: Any) -> str:
    """A short name for everything that decides a plan."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
