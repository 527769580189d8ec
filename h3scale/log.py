"""One logger with the rank in it, and progress bars with rate and time left. No torch here."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

RANK = int(os.environ.get("RANK", "0"))
logger = logging.getLogger("h3scale")


def setup(verbose: bool = False) -> None:
    """Sends h3scale's messages to stderr: everything of rank 0, warnings and worse of the other ranks."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {RANK}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if RANK == 0 else logging.WARNING)


class Progress:
    """Counts work done; `advance(amount, note)` after each piece. Units are the caller's word ("tokens", "tensors")."""

    def __init__(self, what: str, total: float, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start, self.last_line = 0.0, time.monotonic(), 0.0
        self.on_terminal = RANK == 0 and sys.stderr.isatty()

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
        left_s = (self.total - self.done) * seconds / max(self.done, 1e-9)
        line = (
            f"{self.what}: {self.done / max(self.total, 1e-9):4.0%}  {_short(self.done)}/{_short(self.total)} {self.unit}"
            f"  {_short(self.done / seconds)} {self.unit}/s  {_clock(left_s)} left  {note}"
        )
        if self.on_terminal:
            sys.stderr.write("\r\x1b[K" + line + ("\n" if self.done >= self.total else ""))
            sys.stderr.flush()
        else:
            logger.info(line)


@contextmanager
def progress(what: str, total: float, unit: str) -> Iterator[Progress]:
    """A progress line on a terminal, a plain line every ten seconds elsewhere, nothing on ranks above 0."""
    bar = Progress(what, total, unit)
    try:
        yield bar
    finally:
        if bar.on_terminal and 0 < bar.done < bar.total:
            sys.stderr.write("\n")


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1000 if suffix == 'k' else limit):.1f}{suffix}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
