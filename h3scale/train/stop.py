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
    USR2 = 2  # save and end, to be started again: exit code 75. This and the next ones say why.
    TERM = 3
    INT = 4
    ORPHANED = 5  # the launcher is gone: nobody else would end this rank
    END = 6  # save and end, for good: exit code 0, also where a signal asks at the same time

    @property
    def ends(self) -> bool:
        return self > Wish.SAVE

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

    The second SIGINT does, at once: a person who presses the keys again means it. Rank 0 looks for the files. `launcher`: whose end
    is a wish as well.
    """

    def __init__(self, run_folder: Path, rank: int, launcher: psutil.Process | None = None):
        self.run_folder, self.rank = run_folder, rank
        self.signalled = Wish.NONE
        self.closed = threading.Event()
        self.launcher = launcher

    def __enter__(self) -> "Asked":
        self.before = {number: signal.signal(number, self._take) for number in SIGNALS}
        if self.launcher:
            threading.Thread(target=self._watch, args=(self.launcher,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.closed.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def together(self, device: torch.device, is_busy: bool = False) -> tuple[Wish, int, bool]:
        """The greatest wish of all ranks, the first rank that has it, and whether any rank is busy.

        Every rank calls this, between two steps.
        """
        world_size = dist.get_world_size()
        found = torch.tensor([int(self.wish()) * world_size + world_size - 1 - self.rank, int(is_busy)], device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        wish, rank = divmod(int(found[0]), world_size)
        return Wish(wish), world_size - 1 - rank, bool(found[1])

    def wish(self) -> Wish:
        """What this rank asks for now."""
        if self.rank == 0 and (self.run_folder / STOP_FILE).exists():
            return Wish.END
        if self.signalled or self.rank:
            return self.signalled
        return Wish.SAVE if (self.run_folder / SAVE_FILE).exists() else Wish.NONE

    def done(self, wish: Wish) -> None:
        """The run is saved: a file SAVE asks no more, and STOP only where it was asked for (it may have come since)."""
        if self.rank == 0:
            for name in (SAVE_FILE, STOP_FILE) if wish is Wish.END else (SAVE_FILE,):
                (self.run_folder / name).unlink(missing_ok=True)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        wish = SIGNALS[signal.Signals(number)]
        if wish is Wish.INT and self.signalled is Wish.INT:
            raise KeyboardInterrupt
        self.signalled = max(self.signalled, wish)

    def _watch(self, launcher: psutil.Process) -> None:
        while not self.closed.wait(WATCH_S):
            if _is_gone(launcher):
                logger.warning("the launcher (process %d) is gone: this rank saves and ends", launcher.pid)
                self.signalled = max(self.signalled, Wish.ORPHANED)
                return


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:  # between the two
        return True


def find_launcher() -> psutil.Process | None:
    """The process that started the ranks of this machine, the outermost: `deepspeed` has another one in between.

    To be called early: once it is gone nothing tells that there was one.

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
