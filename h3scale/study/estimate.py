"""How long a study will take: each command's start, and its work times what such work took in this folder, or else as stated."""

from collections.abc import Sequence

from h3scale.study.ledger import Entry
from h3scale.study.tasks import Task

START_S = 5.0  # until a command has its libraries and begins
# Seconds a unit of work, by the kind of task: a token trained (dense, fused), an evaluated merge of a search (searched), an
# evaluated model (evaluate), else a command. About what the built-in studies take on two cores; for larger models it is the first
# finished tasks of each kind that tell.
STATED_S = {
    "data": 1.0,
    "tokenizer": 3.0,
    "dense": 2e-4,
    "fused": 7e-4,
    "merge": 3.0,
    "searched": 2.0,
    "fuse": 8.0,
    "consolidate": 4.0,
    "explain": 4.0,
    "evaluate": 6.0,
}


def rates(entries: Sequence[Entry]) -> dict[str, float]:
    """Seconds a unit of work by kind: measured where something of the kind has ended, else stated."""
    found = dict(STATED_S)
    for kind in STATED_S:
        measured = [
            (max(entry.took_s - START_S, 0.0), entry.work)
            for entry in entries
            if entry.kind == kind and entry.done and entry.took_s is not None
        ]
        if measured:
            found[kind] = sum(took for took, _ in measured) / sum(work for _, work in measured)
    return found


def estimate_s(task: Task, known: dict[str, float]) -> float:
    """Seconds of one task."""
    return START_S + task.work * known[task.kind]


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
