"""What a study is made of: tasks, each a command, and the models that they make. No torch."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# Kinds of models that are compared.
SINGLE, MIXTURE, MERGE, SEARCHED, RESM, FUSION, ENSEMBLE = "single", "mixture", "merge", "searched", "resm", "fusion", "ensemble"
GROUPS = (SINGLE, MIXTURE, MERGE, SEARCHED, RESM, FUSION, ENSEMBLE)


@dataclass(frozen=True)
class Task:
    """A command. `makes`: the paths it leaves, the first last. `needs`: names of tasks. `recipe`, `files`: what it reads beside.

    `kind` and `work`: of time, see study.estimate. `tokens` that it trains on; `is_cost`: its time is what a method costs.
    """

    name: str
    why: str
    command: list[str]
    makes: tuple[str, ...]
    kind: str
    work: float = 1
    needs: tuple[str, ...] = ()
    recipe: str | None = None
    files: tuple[Path, ...] = ()
    tokens: int = 0
    is_cost: bool = True


@dataclass(frozen=True)
class Model:
    """One model of the comparison, made once a seed by the task `seed-S/NAME`."""

    name: str
    group: str


@dataclass(frozen=True)
class Plan:
    """All tasks in an order in which each comes after what it needs, and the models that are compared; `compare`: which two."""

    tasks: list[Task]
    models: list[Model]
    compare: list[tuple[str, str]] = field(default_factory=list)

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def lineage(self, name: str) -> list[Task]:
        """A task and all that it needs, each once."""
        found: dict[str, Task] = {}
        waiting = [name]
        while waiting:
            task = self.task(waiting.pop())
            if task.name not in found:
                found[task.name] = task
                waiting += task.needs
        return list(found.values())


def executable(command: list[str]) -> list[str]:
    """The command with this environment's own programs, whatever PATH says."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside) if beside.is_file() else command[0], *command[1:]]
