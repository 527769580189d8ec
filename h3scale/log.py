"""One logger with the rank in it, progress bars with rate and time left, and a file for what libraries say. No torch here."""

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from h3scale.redact import without_secrets

RANK = int(os.environ.get("RANK", "0"))
LIBRARIES = ("DeepSpeed", "transformers")  # loggers that keep their messages from the root logger
BUFFER_CHARS = 1_000_000
logger = logging.getLogger("h3scale")
_stderr: TextIO | None = None  # the terminal's, while sys.stderr is a file
_printer: Callable[[str, int], None] | None = None  # whoever draws on the terminal now


class TerminalHandler(logging.Handler):
    """Writes to the terminal's stderr, past a file that has taken its place and through a view that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = without_secrets(self.format(record))
            if _printer:
                _printer(text, record.levelno)
            else:
                print(text, file=terminal(), flush=True)
        except Exception:  # as all of logging's handlers: a message that fails is told of, and ends nothing
            self.handleError(record)


def setup(verbose: bool = False) -> None:
    """Sends h3scale's messages to stderr: everything of rank 0, warnings and worse of the other ranks."""
    handler = TerminalHandler()
    prefix = f"[rank {RANK}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if RANK == 0 else logging.WARNING)


def terminal() -> TextIO:
    """The stderr that a person sees."""
    return _stderr or sys.stderr


@contextmanager
def printing_through(printer: Callable[[str, int], None]) -> Iterator[None]:
    """Within, messages for the terminal are given to `printer` (text, level), which draws there."""
    global _printer
    before, _printer = _printer, printer
    try:
        yield
    finally:
        _printer = before


class LogFile(io.TextIOBase):
    """Keeps what is written until `open` says where, then writes line by line. A disk error loses lines, not the run."""

    def __init__(self, stderr: TextIO):
        self.stderr, self.path = stderr, Path()
        self.file: TextIO = io.StringIO()

    def open(self, path: Path) -> None:
        """Goes on with the file, or begins it, with what has been kept; its folder is made."""
        kept = self.file.getvalue() if isinstance(self.file, io.StringIO) else ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8", buffering=1)
            self.file.write(kept)
            self.path = path
        except OSError as error:
            logger.warning("%s: messages of libraries are not kept (%s)", path, error.strerror)

    def write(self, text: str) -> int:
        if not isinstance(self.file, io.StringIO) or self.file.tell() < BUFFER_CHARS:
            with suppress(OSError):  # a full disk is told by those who cannot do without it
                self.file.write(without_secrets(text))
        return len(text)

    def fileno(self) -> int:
        return self.stderr.fileno()  # what asks for it writes past Python: a crash must be seen

    def writable(self) -> bool:
        return True


@contextmanager
def libraries_to_file() -> Iterator[LogFile]:
    """Within, what libraries log, warn and print goes to the file that is given; their errors to the terminal too.

    What h3scale logs goes to both. Only Python's own streams are replaced: a message of C code (an abort, a NCCL error)
    reaches the terminal as ever. An exception passes through; its traceback is in the file too, and for one that is our bug
    the terminal is told where, or gets what was kept if there is no file yet.
    """
    global _stderr
    outer = sys.stdout, sys.stderr, _stderr
    aside = LogFile(sys.stderr)
    to_file = logging.StreamHandler(aside)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[tuple[logging.Logger, logging.Handler]] = [
        (logging.getLogger(), to_file),
        (logging.getLogger(), TerminalHandler(logging.ERROR)),
    ]
    handlers += [(logging.getLogger(name), _errors_kept_from_root(name)) for name in LIBRARIES]
    handlers += [] if logger.propagate else [(logger, to_file)]
    _stderr = sys.stderr
    sys.stdout, sys.stderr = aside, aside
    _point_handlers({outer[0], outer[1]}, aside)
    for each, handler in handlers:
        each.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield aside
    except BaseException as error:
        _tell(aside, error)
        raise
    finally:
        logging.captureWarnings(False)
        for each, handler in handlers:
            each.removeHandler(handler)
        sys.stdout, sys.stderr, _stderr = outer
        _point_handlers({aside}, outer[1])
        aside.file.close()


def _errors_kept_from_root(library: str) -> logging.Handler:
    handler = TerminalHandler(logging.ERROR)
    handler.addFilter(lambda record: not logging.getLogger(library).propagate)
    return handler


def _point_handlers(streams: set[object], to: object) -> None:
    """Libraries make handlers that hold on to a stream when they are imported."""
    known = [each for each in logging.Logger.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for handler in [handler for each in known for handler in each.handlers]:
        if type(handler) is logging.StreamHandler and handler.stream in streams:
            handler.setStream(to)


def _tell(aside: LogFile, error: BaseException) -> None:
    kept = aside.file.getvalue() if isinstance(aside.file, io.StringIO) else ""
    aside.write(traceback.format_exc())
    if hasattr(error, "exit_code") or not isinstance(error, Exception):
        return  # an error for people says all there is to say
    if aside.path.name:
        logger.error("what libraries said before: %s", aside.path)
    elif kept:
        print(kept, file=aside.stderr)


class Progress:
    """Counts work done; `advance(amount, note)` after each piece. Units are the caller's word ("tokens", "tensors").

    `before` of the total has been done by somebody else, in another time.
    """

    def __init__(self, what: str, total: float, unit: str, before: float = 0.0):
        self.what, self.total, self.unit = what, total, unit
        self.before, self.done, self.start, self.last_line = before, before, time.monotonic(), 0.0
        self.on_terminal = RANK == 0 and terminal().isatty()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if RANK != 0 or (now - self.last_line < (0.2 if self.on_terminal else 10) and self.done < self.total):
            return
        if not self.on_terminal and not self.last_line and self.done < self.total:
            self.last_line = now  # a first plain line only after ten seconds: short work stays silent
            return
        self.last_line = now
        seconds = max(now - self.start, 1e-9)
        here = self.done - self.before
        left_s = (self.total - self.done) * seconds / max(here, 1e-9)
        line = (
            f"{self.what}: {self.done / max(self.total, 1e-9):4.0%}  {short(self.done)}/{short(self.total)} {self.unit}"
            f"  {short(here / seconds)} {self.unit}/s  {clock(left_s)} left  {note}"
        )
        if self.on_terminal:
            terminal().write("\r\x1b[K" + line + ("\n" if self.done >= self.total else ""))
            terminal().flush()
        else:
            logger.info(line)


@contextmanager
def progress(what: str, total: float, unit: str, before: float = 0.0) -> Iterator[Progress]:
    """A progress line on a terminal, a plain line every ten seconds elsewhere, nothing on ranks above 0."""
    bar = Progress(what, total, unit, before)
    try:
        yield bar
    finally:
        if bar.on_terminal and 0 < bar.done < bar.total:
            terminal().write("\n")


def short(value: float) -> str:
    """A count that fits into a line: 1.2M, 12.3k, 950, 1.5."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1000 if suffix == 'k' else limit):.1f}{suffix}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours before them: 3:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
