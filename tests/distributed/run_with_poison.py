"""Whole training runs, some with a step that is not finite, forked from one process.

python -m tests.distributed.run_with_poison RUNS

RUNS is JSON, name -> {"ranks", "poison", "words"}: recipe and overrides as `python -m h3scale.train` takes them. With "ids", a file
gets a line for each step: its number, and the records of all ranks. Prints JSON, name -> exit codes. `poison` is nothing, or one of
these:

- "loss" or "gradient": not finite, of the last rank's first micro-batch in step BAD_STEP ("... for ever": in all from there on)
- "left out": step BAD_STEP is not computed at all
- "memory": rank 0's forward has none
- "in the way": somebody else makes the output at step BAD_STEP
- "full disk": from step BAD_STEP on a file takes FILE_BYTES and no more; "one full disk": in that step, on the last rank
- "SIGUSR2" or another signal: the last rank gets it in step BAD_STEP; "SIGUSR2 4": in step 4; "SIGTERM 3 SIGUSR2": in step 3, and
  every rank the second one while that is saved
- "STOP" or "SAVE": such a file is made in step BAD_STEP
- "kill RANK SECONDS": ends a rank so long after its first step began
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from h3scale import log
from h3scale.exit_status import run_folder_of
from h3scale.train import __main__ as rank_program
from h3scale.train import dry_run, keep, loop
from h3scale.train.loss import Losses
from tests.distributed.forked import exit_codes

BAD_STEP = 3  # counted from 1
FILE_BYTES = 20_000  # enough for lines of metrics, not for a model


class NotFiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: torch.Tensor) -> torch.Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * torch.inf


class Poison:
    """Stands between the loop and its functions."""

    def __init__(self, what: str, ids: str = ""):
        self.what, self.ids, self.step, self.fresh = what, ids, 0, False
        self.one_step, self.compute_losses = loop.one_step, loop.compute_losses
        loop.one_step, loop.compute_losses = self.take_step, self.take_losses
        self.write_checkpoint = keep.write_checkpoint
        if what.startswith("SIG") and len(what.split()) > 2:
            keep.write_checkpoint = self.disturbed_save
        if what == "memory":
            dry_run.compute_losses = self.no_memory

    def take_step(self, *args: Any) -> Any:
        if not self.step and self.what.startswith(f"kill {log.RANK} "):
            threading.Timer(float(self.what.split()[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
        before = self.step or int(args[1].engine.global_steps)  # of a run that goes on
        self.step, self.fresh = before + 1, True
        if self.ids and log.RANK == 0:
            with Path(self.ids).open("a") as file:
                file.write(f"{self.step} {args[3].records.tolist()}\n")
        if self.what == "in the way" and self.bad and log.RANK == 0:
            out = Path(args[0].out)
            out.mkdir()
            (out / "precious.txt").write_text("mine")
        if self.what == "full disk" and self.bad:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        if self.what.startswith("one full disk") and int(os.environ["WORLD_SIZE"]) - 1 == log.RANK:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES if self.bad else hard, hard))
        if self.what.startswith("SIG") and int(os.environ["WORLD_SIZE"]) - 1 == log.RANK:
            name, when, *_ = [*self.what.split(), BAD_STEP]  # another step may be said
            if self.step == int(when):
                os.kill(os.getpid(), getattr(signal, name))
        if self.bad and self.what in ("STOP", "SAVE") and log.RANK == 0:
            (run_folder_of(args[0].out) / self.what).touch()
        return {} if self.bad and "left out" in self.what else self.one_step(*args)

    @property
    def bad(self) -> bool:
        return self.step == BAD_STEP or (self.step > BAD_STEP and "for ever" in self.what)

    def take_losses(self, *args: Any) -> Losses:
        losses = self.compute_losses(*args)
        if self.bad and self.fresh and int(os.environ["WORLD_SIZE"]) - 1 == log.RANK:
            if "loss" in self.what:
                losses.total = losses.total * torch.nan
            if "gradient" in self.what:
                losses.total = NotFiniteGradient.apply(losses.total)
        self.fresh = False
        return losses

    def disturbed_save(self, *args: Any) -> Any:
        _, when, again = self.what.split()
        if self.step == int(when):
            print(f"{again} in the save", file=sys.__stderr__, flush=True)  # sys.stderr is the libraries' log file in a run
            os.kill(os.getpid(), getattr(signal, again))
        return self.write_checkpoint(*args)

    def no_memory(self, *_args: Any) -> Losses:
        raise torch.OutOfMemoryError("HIP out of memory: tried to allocate 3 GiB" if log.RANK == 0 else "CUDA out of memory.")


def rank_main(run: dict[str, Any]) -> None:
    log.RANK = int(os.environ["RANK"])  # was read before the fork
    Poison(run["poison"], run.get("ids", ""))
    code = rank_program.main(run["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    codes = {name: exit_codes(run["ranks"], rank_main, run) for name, run in json.loads(sys.argv[1]).items()}
    print(json.dumps(codes))
