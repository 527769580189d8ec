"""When ranks wait for one that does not come: where the waiting ones stand, and which one it is."""

import faulthandler
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from h3scale.log import LogFile

SHARE = 0.8  # of the collectives' timeout: before they give up, which ends what the stacks are to show
HUNG_S, GONE_S = 5.0, 1.0  # in which all ranks that are there have noticed: by their timeouts, or by a connection that is closed


@contextmanager
def stacks_when_hung(timeout_s: float) -> Iterator[Callable[[], None]]:
    """Within, this rank's log gets the stacks of all its threads unless the function that is given is called in time.

    It is written by a thread that needs no Python: also where a rank hangs in a library, or in a disk.
    """
    aside = sys.stderr.file if isinstance(sys.stderr, LogFile) else None

    def again() -> None:
        if aside is not None and not isinstance(aside, io.StringIO):
            faulthandler.dump_traceback_later(SHARE * timeout_s, file=aside)

    again()
    try:
        yield again
    finally:
        faulthandler.cancel_dump_traceback_later()


def missing_ranks(was_timeout: bool, log: Path) -> list[int]:
    """The ranks that do not say within seconds that they have noticed too; none where that cannot be found out.

    Each rank that has lost another one calls this, about at the same time. The store that all ranks met at may be on one that
    is gone: then it is rank 0, where no launcher keeps the store. torch writes a stack of its own about that, which goes to `log`.
    """
    found: dict[int, bool] = {dist.get_rank(): True}
    asking = threading.Thread(target=_ask, args=(found, HUNG_S if was_timeout else GONE_S), daemon=True)
    with _stderr_to(log):
        asking.start()
        asking.join(2 * HUNG_S)  # a store whose process is stopped takes the question and never answers
    if len(found) == 1:
        return [0] if dist.get_rank() else []
    return [rank for rank in range(dist.get_world_size()) if not found.get(rank)]


def _ask(found: dict[int, bool], seconds: float) -> None:
    with suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        store.set(_here(dist.get_rank()), "")
        until = time.monotonic() + seconds
        while True:
            for rank in range(dist.get_world_size()):
                found[rank] = found.get(rank, False) or store.check([_here(rank)])
            if all(found.values()) or time.monotonic() > until:
                return
            time.sleep(0.1)


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Also what C code writes."""
    try:
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:  # the run had not got so far
        target = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(2)
    try:
        os.dup2(target, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(target)


def _here(rank: int) -> str:
    return f"h3scale/has-lost-a-rank/{rank}"
