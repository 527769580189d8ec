"""Kills a save, or lets it fail, at each of its system calls, by strace; then the real reader says what is there.

python -m tests.faults.sweep ASKED

ASKED is JSON: `words` (recipe and overrides of a run of one rank), `of` ("save" or "finish": which of the Keeper's methods),
`step` (after how many steps), `faults` ("KILL", "error": that the disk refuses), `share` of the calls, drawn by a seed, and
`samples`: the folder for some of the killed runs, as they were left. Prints JSON lines, one a call: what `look` finds, and how the
method ended.

The run goes on to that moment once; each fault is one of a fork of its own. That can be because torch's process group "threaded"
has no thread where there is one rank: gloo's would be missing in the fork. What is written is the same, whatever carries the
collectives.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  before the fork
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg  # noqa: F401  makes the backend "threaded" known

from h3scale.checkpoint.training_checkpoint import find_checkpoint
from h3scale.errors import H3Error
from h3scale.exit_status import checkpoints_in, run_folder_of
from h3scale.train import __main__ as rank_program
from h3scale.train.keep import Keeper

# What can change a disk, and with which error it may refuse.
ERRORS = {
    "openat": "ENOSPC",  # no inodes are left
    "mkdir": "EDQUOT",
    "write": "ENOSPC",
    "writev": "ENOSPC",
    "pwrite64": "EIO",
    "fsync": "EIO",
    "rename": "EROFS",
    "renameat2": "EROFS",
    "unlink": "EIO",
    "unlinkat": "EIO",
    "rmdir": "EIO",
}
SAMPLES = 6
Call = tuple[str, int, str]  # name, number among those of its name, the line of strace


class Sweep:
    """Stands in for a method of the Keeper."""

    def __init__(self, asked: dict[str, Any]):
        self.asked = asked
        self.plain = getattr(Keeper, asked["of"])
        setattr(Keeper, asked["of"], lambda keeper, *arguments: self.instead(keeper, *arguments))

    def instead(self, keeper: Keeper, *arguments: Any) -> Any:
        if arguments and arguments[0] != self.asked["step"]:
            return self.plain(keeper, *arguments)
        self.keeper, self.arguments = keeper, arguments
        self.place, self.before = keeper.out.parent, keeper.out.parent.with_name(f"{keeper.out.parent.name}-before")
        shutil.copytree(self.place, self.before, symlinks=True)
        calls = self.calls()
        rng = random.Random(0)
        chosen = [(fault, call) for fault in self.asked["faults"] for call in calls if rng.random() < self.asked["share"]]
        chosen = [(fault, call) for fault, call in chosen if fault == "KILL" or call[0] != "openat" or "O_CREAT" in call[2]]
        killed = [i for i, (fault, _) in enumerate(chosen) if fault == "KILL"]
        kept = rng.sample(killed, min(SAMPLES, len(killed))) if self.asked["samples"] else []
        for i, (fault, call) in enumerate(chosen):
            found = {"fault": fault} | self.fails_at(call, fault)
            if i in kept:
                found["sample"] = str(Path(self.asked["samples"]) / f"{i:04d}")
                shutil.copytree(self.place, found["sample"], ignore=lambda _, names: [n for n in names if n.endswith(".lock")])
            line = {"of": len(calls), "call": call[0], "number": call[1], "line": call[2]} | found
            print(json.dumps(line), file=sys.__stdout__, flush=True)  # sys.stdout is the libraries' log file in a run
        os._exit(0)

    def calls(self) -> list[Call]:
        """The calls of the method that touch the run's place."""
        trace, _, code = self.forked([])
        assert code == 0, trace
        numbers: Counter[str] = Counter()
        found: list[Call] = []
        for line in trace.splitlines():
            match = re.match(r"\d+ +(\w+)\(", line)
            if match and match[1] in ERRORS:
                numbers[match[1]] += 1
                if str(self.place) in line:
                    found.append((match[1], numbers[match[1]], line))
        return found

    def fails_at(self, call: Call, kind: str) -> dict[str, Any]:
        fault = "signal=KILL" if kind == "KILL" else f"error={ERRORS[call[0]]}"
        _, told, code = self.forked(["-e", f"inject={call[0]}:{fault}:when={call[1]}"])
        return {"code": code, "told": told, **look(self.keeper.out)}

    def forked(self, options: list[str]) -> tuple[str, Any, int]:
        """What strace wrote, what the method's errors said, and how the fork ended, which does it all from the same disk."""
        self.restore()
        trace = self.place.with_name("trace.txt")
        go, told = os.pipe(), os.pipe()
        process = os.fork()
        if not process:
            os.read(go[0], 1)
            os.write(told[1], json.dumps(self.told()).encode())
            os._exit(0)
        os.close(told[1])
        names = ",".join(ERRORS)
        command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={names}", *options, "-o", str(trace), "-p", str(process)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr
            assert "attached" in strace.stderr.readline()
            os.write(go[1], b"x")
            text = b"".join(iter(lambda: os.read(told[0], 2**16), b"")).decode()
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        for descriptor in (*go, told[0]):
            os.close(descriptor)
        return trace.read_text(), json.loads(text) if text else None, code

    def told(self) -> list[Any]:
        """How the method ended: exit code, findings, and what there was then; of a save, also the second time that it was tried."""
        ends: list[Any] = []
        for _ in range(2 if self.asked["of"] == "save" else 1):
            try:
                self.plain(self.keeper, *self.arguments)
            except H3Error as error:
                ends.append([error.exit_code, error.findings])
            except BaseException as error:
                ends.append([None, [repr(error)]])
            else:
                return [*ends, [0, [], look(self.keeper.out)]]
            ends[-1].append(look(self.keeper.out))
        return ends

    def restore(self) -> None:
        for path in self.place.iterdir():
            if not path.name.endswith(".lock"):  # this run's own
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(self.before, self.place, symlinks=True, dirs_exist_ok=True)


def look(out: Path) -> dict[str, Any]:
    """What is at `out`, and in the run's folder beside it: names, steps that are whole, what is wrong with others."""
    run_folder = run_folder_of(out)
    wrong: list[str] = []
    steps: list[int] = []
    for path, step in checkpoints_in(run_folder).items():
        try:
            bad = find_checkpoint(path).check_hashes()
        except H3Error as error:
            bad = error.findings
        wrong += bad
        steps += [] if bad else [step]
    return {
        "steps": sorted(steps),
        "wrong": wrong,
        "names": sorted(path.name for path in run_folder.iterdir()) if run_folder.is_dir() else None,
        "out": sorted(path.name for path in out.iterdir()) if out.is_dir() else None,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = json.loads(sys.argv[1])
    dist.init_process_group("threaded", rank=0, world_size=1, store=dist.HashStore())
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    Sweep(asked)
    code = rank_program.main(asked["words"])
    sys.exit(f"the run ended with {code} before the method was called")
