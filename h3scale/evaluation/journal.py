"""What has been scored so far, so that an interrupted evaluation goes on: a folder of JSON lines, one a finished unit of work."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from h3scale.errors import OutputError, StorageError


@contextmanager
def kept(folder: Path | None) -> Iterator["Journal"]:
    """The journal in a folder; in one that is soon gone where none is given."""
    with TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        yield Journal(Path(place))


class Journal:
    """Units of work by their key, and the numbers that each gave. A line that a kill has torn counts as not written.

    Every writer has a file of its own, so processes do not wait for each other and nothing follows a torn line.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self) -> dict[str, list[float]]:
        """The numbers of every finished unit."""
        found: dict[str, list[float]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                found.update(_parsed(line))
        return found

    @contextmanager
    def writer(self) -> Iterator["Writer"]:
        """A file that takes units. Raises OutputError (73) where it cannot be made."""
        path = self.folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("x", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be made ({error.strerror})") from None
        with file:
            yield Writer(file)


class Writer:
    """Writes units as they are done."""

    def __init__(self, file: TextIO):
        self.file = file

    def add(self, key: str, values: Sequence[float]) -> None:
        """Raises StorageError (74) when the disk refuses."""
        try:
            self.file.write(json.dumps({"unit": key, "values": list(values)}) + "\n")
            self.file.flush()
        except OSError as error:
            raise StorageError(f"{self.file.name}: cannot be written ({error.strerror})") from None


def _parsed(line: str) -> dict[str, list[float]]:
    try:
        entry = json.loads(line)
        return {entry["unit"]: [float(value) for value in entry["values"]]}
    except (ValueError, TypeError, KeyError):
        return {}
