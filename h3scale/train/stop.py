"""What asks a run to save, or to save and end: signals to any rank, files in the run's folder, a launcher that is gone.

Nothing happens at once: at the end of each step the ranks tell each other what they were asked, and all do the same.
"""

import enum
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch
import torch.distributed as dist

from h3scale.log import logger

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
WATCH_S = 2.0
LAUNCHERS = {"deepspeed", "torchrun", "h3scale", "deepspeed.launcher.launch", "torch.distributed.run", "h3scale.cli.main"}


class Wish(enum.IntEnum):
    """What a rank asks for; of several, the greatest is done."""

    NONE = 0
    SAVE = 1  # save once and go on
    END = 2  # save and end, for good: exit code 0
    USR2 = 3  # save and end, to be started again: exit code 75. This and the rest say why.
    TERM = 4
    INT = 5
    ORPHANED = 6  # the launcher is gone: nobody else would end this rank

    @property
    def ends(self) -> bool:
        return self >= Wish.END

    def __str__(self) -> str:
        return _WORDS.get(self, f"SIG{self.name}")


_WORDS = {
    Wish.SAVE: f"a file {SAVE_FILE}",
    Wish.END: f"a file {STOP_FILE}",
    Wish.ORPHANED: "the launcher is gone",
}
SIGNALS = {signal.SIGUSR2: Wish.USR2, signal.SIGTERM: Wish.TERM, signal.SIGINT: Wish.INT}


class Asked:
    """What this rank has been asked since it was last looked. A context, in which signals end nothing by themselves.

    The second SIGINT does, at once: a person who presses the keys again means it. Rank 0 looks for the files.
    """

    def __init__(self, run_folder: Path, rank: int):
        self.run_folder, self.rank = run_folder, rank
        self.signalled = Wish.NONE
        self.closed = threading.Event()

    def __enter__(self) -> "Asked":
        self.before = {number: signal.signal(number, self._take) for number in SIGNALS}
        launcher = _launcher()
        if launcher:
            threading.Thread(target=self._watch, args=(launcher,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.closed.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def together(self, device: torch.device) -> tuple[Wish, int]:
        """The greatest wish of all ranks, and the first rank that has it. Every rank calls this, between two steps."""
        world_size = dist.get_world_size()
        found = torch.tensor(int(self.wish()) * world_size + world_size - 1 - self.rank, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        wish, rank = divmod(int(found), world_size)
        return Wish(wish), world_size - 1 - rank

    def wish(self) -> Wish:
        """What this rank asks for now."""
        if self.signalled or self.rank:
            return self.signalled
        if (self.run_folder / STOP_FILE).exists():
            return Wish.END
        return Wish.SAVE if (self.run_folder / SAVE_FILE).exists() else Wish.NONE

    def done(self) -> None:
        """What a file asked for has been done; it asks no more."""
        if self.rank == 0:
            for name in (STOP_FILE, SAVE_FILE):
                (self.run_folder / name).unlink(missing_ok=True)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        wish = SIGNALS[signal.Signals(number)]
        if wish is Wish.INT and self.signalled is Wish.INT:
            raise KeyboardInterrupt
        self.signalled = max(self.signalled, wish)

    def _watch(self, launcher: psutil.Process) -> None:
        while not self.closed.wait(WATCH_S):
            if not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE:
                logger.warning("the launcher (process %d) is gone: this rank saves and ends", launcher.pid)
                self.signalled = max(self.signalled, Wish.ORPHANED)
                return


def _launcher() -> psutil.Process | None:
    """The process that started the ranks of this machine, the outermost: `deepspeed` has another one in between.

    None for a rank that no launcher started, or Slurm: srun ends its own. SIGTERM to `deepspeed` ends it alone, and its ranks
    would go on; `torchrun` and `h3scale train` hand signals on, but not a kill -9.
    """
    if "LOCAL_RANK" not in os.environ or "SLURM_PROCID" in os.environ:
        return None
    found = None
    for parent in psutil.Process().parents():
        try:
            words = {Path(word).name for word in parent.cmdline()[:4]}  # of "python -u -m NAME" or "python PATH/NAME"
        except psutil.Error:
            break
        if not words & LAUNCHERS:
            break
        found = parent
    return found
