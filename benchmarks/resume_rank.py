"""A rank of a training run that tells when its first step begins, or how long its saves take.

`python benchmarks/resume_rank.py begin RECIPE.json` or `python benchmarks/resume_rank.py save RECIPE.json SCRATCH`.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Row
from ranks import MARK

from h3scale.train import __main__ as program
from h3scale.train import loop
from h3scale.train.keep import Keeper


def tell(answer: Row) -> None:
    """One line for who measures; sys.stdout is the libraries' log file in a run."""
    print(MARK + json.dumps(answer), file=sys.__stdout__, flush=True)


def tell_the_first_step() -> None:
    plain = loop.one_step

    def one_step(*arguments: Any) -> Any:
        loop.one_step = plain
        tell({})
        return plain(*arguments)

    loop.one_step = one_step


SAVE, BEGIN, END = "h3scale", "h3scale, in the background: begins", "h3scale, in the background: ends after a step"


class Saves:
    """After each step: h3scale's save, DeepSpeed's own, and a copy of h3scale's bytes by one rank, all by the clock on the wall.

    Every second one is in the background: what holds the training up is that it begins, and that it ends, after the next step.
    """

    def __init__(self, scratch: Path):
        self.scratch, self.plain = scratch, Keeper.save
        self.seconds: dict[str, list[float]] = {}
        self.bytes = 0
        loop.save_if_asked = self.after  # type: ignore[assignment]

    def after(self, t: Any, step: int, _asked: Any) -> None:
        if step == t.recipe.steps:
            return
        folder, background = t.keeper.state_folder(step), step % 2 == 0
        settings = t.recipe.save.model_copy(update={"background": background})
        t.keeper.recipe = t.recipe.model_copy(update={"save": settings})
        save = {BEGIN if background else SAVE: lambda: t.keeper.save(step, must=False)}
        shares: dict[str, Callable[[], None]] = save if background else {END: t.keeper.settle, **save}
        if not background:
            shares["DeepSpeed, without hashes and fsync"] = lambda: self._deepspeed(t.run.engine)
            shares["cp and fsync"] = lambda: self._copy(folder) if t.run.rank == 0 else None
        with t.metrics.paused():
            for name, work in shares.items():
                dist.barrier()
                began = time.perf_counter()
                work()
                dist.barrier()
                self.seconds.setdefault(name, []).append(time.perf_counter() - began)
                if t.run.rank == 0:
                    shutil.rmtree(self.scratch, ignore_errors=True)
        if not background:
            self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def _deepspeed(self, engine: Any) -> None:
        engine.save_checkpoint(str(self.scratch), tag="deepspeed", save_latest=False)

    def _copy(self, folder: Path) -> None:
        shutil.copytree(folder, self.scratch)
        for path in self.scratch.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def main() -> None:
    torch.set_num_threads(1)
    what, path, *scratch = sys.argv[1:]
    saves = Saves(Path(scratch[0])) if what == "save" else None
    if what == "begin":
        tell_the_first_step()
    code = program.main([path])
    if saves:
        tell({"seconds": saves.seconds, "bytes": saves.bytes})
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
