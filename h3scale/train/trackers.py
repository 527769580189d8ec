"""Where a step's line goes: metrics.jsonl always, the trackers that the recipe asks for, never at the run's cost."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from h3scale.config.recipe import TrainRecipe
from h3scale.errors import StorageError
from h3scale.log import logger

Line = dict[str, Any]
FLUSH_S = 30


class Tracker(Protocol):
    """Takes the figures of each step."""

    def write(self, step: int, line: Line) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, on disk when `write` returns. StorageError (74): a run whose disk is full is to stop."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, line: Line) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`; on disk at the latest after `FLUSH_S`.

    tensorboardX's SummaryWriter hands events to a thread; when that dies (disk full) the queue before it fills up, and the
    training would wait for ever. So events are written here and now, one a step: an error comes back to the caller.
    """

    def __init__(self, folder: Path, recipe: TrainRecipe, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))
        self.flushed = 0.0
        start = SessionLog(status=SessionLog.START)  # hides what is of this step or a later one in earlier files
        self.writer.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self._write(first_step, text("recipe", f"```json\n{recipe.model_dump_json(indent=2)}\n```"))

    def write(self, step: int, line: Line) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in _figures(line).items()]
        self._write(step, Summary(value=values))

    def close(self) -> None:
        self.writer.close()

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        now = time.time()
        self.writer.write_event(Event(wall_time=now, step=step, summary=summary))
        if now - self.flushed > FLUSH_S:
            self.writer.flush()
            self.flushed = now


class Wandb:
    """Weights & Biases; what is not set here comes from WANDB_* variables."""

    def __init__(self, project: str, folder: Path, recipe: TrainRecipe, run_id: str):
        import wandb

        # the recipe says all that is meant to be sent: no code, no state of a git work tree
        settings = wandb.Settings(disable_git=True, disable_code=True)
        name = Path(recipe.out).name
        config = recipe.model_dump(mode="json")
        self.run = wandb.init(
            project=project, name=name, config=config, dir=str(folder), settings=settings, id=run_id, resume="allow"
        )

    def write(self, step: int, line: Line) -> None:
        self.run.log(_figures(line), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio: local unless TRACKIO_SPACE_ID says otherwise."""

    def __init__(self, project: str, recipe: TrainRecipe, run_id: str):
        import trackio

        self.trackio = trackio
        name = f"{Path(recipe.out).name}-{run_id}"  # which is all that trackio knows a run by
        trackio.init(project=project, name=name, config=recipe.model_dump(mode="json"), resume="allow")

    def write(self, step: int, line: Line) -> None:
        self.trackio.log(_figures(line), step=step)

    def close(self) -> None:
        self.trackio.finish()


class Guarded:
    """A tracker that cannot stop the run: what it raises, at making, writing or closing, is one warning, and it is off."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name = name
        self.tracker: Tracker | None = None
        self._try(lambda: setattr(self, "tracker", make()))

    def write(self, step: int, line: Line) -> None:
        if self.tracker:
            self._try(lambda: self.tracker.write(step, line))  # type: ignore[union-attr]

    def close(self) -> None:
        if self.tracker:
            self._try(lambda: self.tracker.close())  # type: ignore[union-attr]
        self.tracker = None

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self.tracker = None
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            logger.warning("%s is off from now on: %s (training goes on; metrics.jsonl has everything)", self.name, reason[0])


def open_trackers(recipe: TrainRecipe, folder: Path, run_id: str, first_step: int) -> list[Tracker]:
    """The trackers that the recipe asks for, writing into `folder` if they write files. For one rank only.

    A run that goes on after `first_step` steps has the same `run_id` as before.
    """
    asked = recipe.tracking
    makers: dict[str, Callable[[], Tracker] | None] = {
        "tensorboard": (lambda: TensorBoard(folder / "tensorboard", recipe, first_step)) if asked.tensorboard else None,
        "wandb": (lambda: Wandb(str(asked.wandb), folder, recipe, run_id)) if asked.wandb else None,
        "trackio": (lambda: Trackio(str(asked.trackio), recipe, run_id)) if asked.trackio else None,
    }
    return [Guarded(name, make) for name, make in makers.items() if make]


def _figures(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and math.isfinite(value)}
