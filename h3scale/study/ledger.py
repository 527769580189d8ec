"""What of a study is done: a file a task, with the key of what it was made from and the time it took.

A task's key is a hash of its command, of the recipe and the files it reads, of the keys of the tasks it needs and of h3scale's
version: a change re-runs what depends on it and nothing else.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from h3scale import __version__
from h3scale.checkpoint.shards import read_json, write_json
from h3scale.config.base import find, load_yaml
from h3scale.errors import MissingInputError
from h3scale.study.tasks import Plan, Task
from h3scale.versions import versions

FOLDER = "steps"
# What a command that was cut off leaves beside its result: training, merging and consolidating, all else, evaluating.
_BESIDE = (".run-{}", ".partial-{}", ".partial-{}.journal", ".partial-{}-*", ".trash-{}-*", "{}.scored")


@dataclass(frozen=True)
class Entry:
    """A task that was started. `took_s`: how long it took if it ended, or until it was stopped; none where nobody lived to say.

    `code`: which h3scale began it, the last time.
    """

    key: str
    kind: str
    work: float
    done: bool = False
    took_s: float | None = None
    code: str | None = None


def keys_of(plan: Plan) -> dict[str, str]:
    """Each task's key. MissingInputError (66) with all the files that are missing."""
    missing = [
        f"{file}: no such file" for file in dict.fromkeys(f for task in plan.tasks for f in task.files) if not file.is_file()
    ]
    if missing:
        raise MissingInputError(missing)
    keys: dict[str, str] = {}
    for task in plan.tasks:
        read = [recipe_text(task.recipe) if task.recipe else "", *map(file_hash, task.files)]
        parts = [__version__, task.command, read, [keys[name] for name in task.needs]]
        keys[task.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return keys


class Ledger:
    """The files of a study's folder."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / FOLDER

    def entry(self, task: Task) -> Entry | None:
        path = self._path(task.name)
        return Entry(**read_json(path)) if path.is_file() else None

    def entries(self) -> list[Entry]:
        """Of all tasks that this folder has known."""
        return [Entry(**read_json(path)) for path in sorted(self.folder.glob("*.json"))]

    def is_done(self, task: Task, key: str) -> bool:
        """Whether what it makes is there, made from the same. A command leaves its result whole or not at all, so what is there
        of one that was started from the same is whole, though nobody lived to note it."""
        entry = self.entry(task)
        return entry is not None and entry.key == key and (self.out / task.makes[0]).exists()

    def begin(self, task: Task, key: str) -> None:
        """Notes that it is started. What was made from something else goes first, and what the same left by halves."""
        entry = self.entry(task)
        is_same = entry is not None and entry.key == key
        for made in task.makes[1:] if is_same else task.makes:
            remove(self.out / made, with_leftovers=not is_same)
        self._write(task, Entry(key, task.kind, task.work, code=versions()["h3scale"]))

    def spent_s(self, task: Task, key: str) -> float | None:
        """What has gone into it that is to be gone on with; none where that is not known."""
        entry = self.entry(task)
        return entry.took_s if entry is not None and entry.key == key and not entry.done else 0.0

    def end(self, task: Task, key: str, took_s: float | None, done: bool = True) -> None:
        """Notes that it is done, or stopped."""
        entry = self.entry(task)
        code = entry.code if entry is not None and entry.key == key else versions()["h3scale"]
        self._write(task, Entry(key, task.kind, task.work, done, took_s, code))

    def _write(self, task: Task, entry: Entry) -> None:
        self.folder.mkdir(exist_ok=True)
        write_json(self._path(task.name), asdict(entry))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '.')}.json"


def remove(path: Path, with_leftovers: bool) -> None:
    """Deletes a file or folder that a task made, and what one that was cut off left beside it."""
    names = [path.name, *(pattern.format(path.name) for pattern in _BESIDE if with_leftovers)]
    for found in [each for name in names for each in path.parent.glob(name)]:
        shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()


def states(plan: Plan, keys: dict[str, str], ledger: Ledger) -> dict[str, bool]:
    """Which tasks are done."""
    return {task.name: ledger.is_done(task, keys[task.name]) for task in plan.tasks}


def recipe_text(path: str) -> str:
    """A recipe with what it extends, without its comments, and the DeepSpeed file that it names."""
    values = load_yaml(find(path))
    deepspeed = find(values["deepspeed"]).read_text(encoding="utf-8") if "deepspeed" in values else ""
    return json.dumps([values, deepspeed], sort_keys=True, default=str)


@cache
def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
