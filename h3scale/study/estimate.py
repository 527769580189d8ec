"""How long a study will take: the work of each task times what such work took in this folder, or else as stated."""

from collections.abc import Sequence

from h3scale.study.ledger import Entry
from h3scale.study.tasks import Task

# Seconds a unit of work, by the kind of task: a token trained (dense, fused), an evaluated merge of a search (searched), an
# evaluated model (evaluate), else a command. Seen with recipes/demo-quick on two busy cores; larger models take longer, which the
# first finished task of each kind then tells.
STATED_S = {
    "data": 5.0,
    "tokenizer": 10.0,
    "dense": 4e-4,
    "fused": 1.5e-3,
    "merge": 8.0,
    "searched": 3.0,
    "fuse": 15.0,
    "consolidate": 10.0,
    "explain": 10.0,
    "evaluate": 8.0,
}


def rates(entries: Sequence[Entry]) -> dict[str, float]:
    """Seconds a unit of work by kind: measured where something of the kind has ended, else stated."""
    found = dict(STATED_S)
    for kind in STATED_S:
        measured = [(entry.took_s, entry.work) for entry in entries if entry.kind == kind and entry.took_s is not None]
        if measured:
            found[kind] = sum(took for took, _ in measured) / sum(work for _, work in measured)
    return found


def estimate_s(task: Task, known: dict[str, float]) -> float:
    """Seconds of one task."""
    return task.work * known[task.kind]


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
