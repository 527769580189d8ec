"""The ranks of one machine: started together, ended together, with their exit code kept.

`deepspeed` leaves its ranks running after a SIGTERM, `torchrun` turns every exit code into 1; users of one machine need
neither, but both launchers work as well (the environment they set is all that a rank needs).
"""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

GRACE_S = 20  # how long ranks may take to end after another one failed before they are killed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_ranks(command: list[str], ranks: int) -> int:
    """Runs `command` as `ranks` processes with RANK, WORLD_SIZE, ... set; gives the exit code of the first that fails.

    SIGTERM, SIGINT and SIGUSR2 go on to every rank, which may take their time to save; 128 + the signal is given for ranks
    that it ended. When one rank fails the others are ended.
    """
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        for rank in range(ranks):
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Not of the terminal's group: Ctrl-C would come from there and from here, and the second one ends a rank at once.
            processes.append(subprocess.Popen(command, env=environment, process_group=0))
        while _running_fine(processes):
            time.sleep(0.05)
        first = next((process.returncode for process in processes if process.returncode), 0)
        if first == os.EX_TEMPFAIL:  # saved, as the others are about to: they end by themselves
            _wait(processes)
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    if first >= 0:
        return first
    return 128 + received[0] if received else 69  # killed by somebody else: what the other ranks would say as well


def rank_command(module: str, arguments: list[str]) -> list[str]:
    """This Python running a module."""
    return [sys.executable, "-m", module, *arguments]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _running_fine(processes: list[subprocess.Popen[bytes]]) -> bool:
    codes = [process.poll() for process in processes]
    return None in codes and not any(codes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, for GRACE_S at most."""
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
