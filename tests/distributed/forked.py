"""Ranks forked from one process, so that the slow imports happen once; apart from that they are started as torchrun does.

transformers and deepspeed import most of what they need when it is first used, which would be in every rank, 2 s of each: hence the
modules named here.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import h3scale.train.loop  # noqa: F401
from h3scale.launch.local import free_port


def launch(title: str, ranks: int, target: Callable[..., None], *arguments: Any) -> None:
    """Runs `target(*arguments)` on every rank. Raises SystemExit where one fails."""
    codes = exit_codes(ranks, target, *arguments)
    if any(codes):
        sys.exit(f"{title}: exit codes {codes}")


def exit_codes(ranks: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Runs `target(*arguments)` on every rank; how each one ended, below 0 for a signal."""
    own, processes = dict(os.environ), []
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        for rank in range(ranks):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
            process.start()
            processes.append(process)
    finally:
        os.environ.clear()
        os.environ.update(own)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
