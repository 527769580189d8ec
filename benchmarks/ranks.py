"""Ranks that wait between rounds: processes of one thread each, asked together by one that measures."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from measure import Row, cpu_s

MARK = "=> "  # before an answer: DeepSpeed prints as well
POLL_S = 0.005  # what is needed for one layer lives for hundredths of a second


class Ranks:
    """`python SCRIPT WORDS` as `num_ranks` processes, of which each answers with `serve`. RuntimeError when one ends unasked."""

    def __init__(self, script: str, words: Sequence[str], num_ranks: int = 1, python: str = sys.executable):
        from h3scale.launch.local import free_port  # ranks of other environments do not have it

        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.what = f"{Path(script).name} {words[0]}"
        self.processes = [
            subprocess.Popen(
                [python, script, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(num_ranks)
        ]

    def ask(self, question: str) -> list[Row]:
        """The answers of all ranks, in their order."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write(question + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: "subprocess.Popen[str]") -> Row:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))  # type: ignore[no-any-return]
        raise RuntimeError(f"{self.what}: a rank ended with exit {process.wait()}")

    def memory_mib(self) -> list[float]:
        """What each rank holds for itself now: anonymous and shared memory, without the pages of mapped files."""
        return [own_mib(process.pid) for process in self.processes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            assert process.stdin
            process.kill() if kind else process.stdin.close()
        for process in self.processes:
            process.wait()


class Peaks:
    """Within, the most that each rank holds for itself, MiB."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.mib = ranks, ranks.memory_mib()
        self.ended = threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self.ended.wait(POLL_S):
            self.mib = [max(pair) for pair in zip(self.mib, self.ranks.memory_mib(), strict=True)]

    def __enter__(self) -> "Peaks":
        self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.sampler.join()


def serve(answer: Callable[[str], Row]) -> None:
    """In a rank: answers each question until there are no more, and ends the process."""
    for line in sys.stdin:
        print(MARK + json.dumps(answer(line.strip())), flush=True)
    os._exit(0)  # DeepSpeed's exit handlers take seconds


def timed(work: Callable[[], Row]) -> Row:
    """What the work gives, with the seconds it took by the wall and of this process's CPU, with processes that it started."""
    wall, cpu = time.perf_counter(), cpu_s()
    found = work()
    return found | {"cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}


def own_mib(pid: int) -> float:
    """Anonymous and shared memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024
