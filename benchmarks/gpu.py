"""All that is measured on a GPU, in one command: python benchmarks/gpu.py --budget MINUTES --out FOLDER [--tiny] [--only NAME,...].

The most important first, each part in a process of its own with the time that is left. FOLDER/gpu.json says of every part, as soon
as it has ended, how it ended; beside it are the parts' results and what they printed. benchmarks/README.md says more.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from measure import ROOT, Row, command_line, machine, versions, write_result

LEAST_S = 10  # a process has hardly imported torch by then
SAID_LINES = 30
DONE, FAILED, LATE, NOT_RUN = "done", "failed", "out of time", "not run"


@dataclass(frozen=True)
class Part:
    """`words` follow Python; `result`: the JSON that it writes. `after`: runs only where that part has failed."""

    words: list[str]
    result: str = ""
    needs_cuda: bool = False
    after: str = ""
    environment: dict[str, str] = field(default_factory=dict)


LAYER = ["benchmarks/moe_layer.py", "--only", "layer,loads,few_tokens"]
PARTS = {
    "ceilings": Part(["benchmarks/moe_layer.py", "--only", "ceilings"], "ceilings_gpu.json"),
    "layer": Part(LAYER, "moe_layer_gpu.json"),
    # A CUDA error lasts as long as its process: what MegaBlocks may break beside a torch it was not made for, it breaks for all.
    "layer_again": Part(LAYER, "moe_layer_gpu_again.json", after="layer", environment={"BENCHMARK_WITHOUT": "MegaBlocks"}),
    "tests": Part(["-m", "pytest", "-m", "gpu", "tests/gpu"], needs_cuda=True),
    "step": Part(["benchmarks/train_step.py", "--only", "step"], "train_step_gpu.json"),
    "merging": Part(["benchmarks/merging_kernels.py"], "merging_gpu.json"),
}


def main() -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and with it the part that runs
    words, parser = _words()
    about = versions(("torch", "triton", "transformers", "deepspeed", "peft", "megablocks", "stanford-stk"))
    if not (words.dirty or words.tiny) and (about["h3scale"] == "unknown" or about["h3scale"].endswith("+")):
        parser.error(
            "h3scale/ or benchmarks/ differs from its commit (commit it, or --dirty; BENCHMARK_COMMIT in a copy without git)"
        )
    device = _device()
    if not (device or words.tiny):
        parser.error("no CUDA device here (works: --tiny, to rehearse)")
    result: Row = {"command": command_line("gpu.py", [words.out]), "machine": {**machine(), "device": device or "cpu"}}
    result |= {"versions": about, "subjects": {}}
    words.out.mkdir(parents=True, exist_ok=True)
    for name in words.only:
        left = began + 60 * words.budget - time.monotonic()
        reason = _not_now(PARTS[name], left, bool(device), result["subjects"])
        result["subjects"][name] = {"state": NOT_RUN, "reason": reason} if reason else _run(name, PARTS[name], words, left)
        write_result(words.out / "gpu.json", result)
        print(f"{name}: {_line(result['subjects'][name])}", flush=True)
    return int(any(found["state"] in (FAILED, LATE) for found in result["subjects"].values()))


def _words() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, required=True, help="minutes for all; what is not ready then is ended")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="two minutes, on a CPU too, to see that everything works")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma, in this order (default: %(default)s)")
    parser.add_argument("--dirty", action="store_true", help="also in a tree that differs from its commit")
    words = parser.parse_args()
    words.only = words.only.split(",")
    wrong = [name for name in words.only if name not in PARTS]
    if wrong:
        parser.error(f"--only: '{wrong[0]}' is no part (works: {', '.join(PARTS)})")
    return words, parser


def _device() -> str | None:
    """The GPU's name, asked by a process that ends: a context of its own takes memory from what is measured."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _not_now(part: Part, left_s: float, has_cuda: bool, before: Row) -> str | None:
    if part.needs_cuda and not has_cuda:
        return "needs a CUDA device"
    if part.after and before.get(part.after, {}).get("state") != FAILED:
        return f"{part.after} has not failed"
    return f"{max(left_s, 0):.0f} s were left" if left_s < LEAST_S else None


def _run(name: str, part: Part, words: argparse.Namespace, left_s: float) -> Row:
    """How it ended. What it printed goes to gpu.log; its last lines are kept here, but where all went well."""
    out = words.out.resolve()
    command = [sys.executable, *part.words]
    if part.result:
        (out / part.result).unlink(missing_ok=True)  # of a run before
        command += ["--out", str(out / part.result), *(["--tiny"] if words.tiny else []), *(["--dirty"] if words.dirty else [])]
        command += ["--dirty"] if words.tiny and not words.dirty else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.environment}
    if words.tiny:
        environment["BENCHMARK_AS_ON_GPU"] = "1"
    began = time.monotonic()
    with (out / "gpu.log").open("a", encoding="utf-8") as log:
        log.write(f"\n== {name}\n")
        log.flush()
        start = log.tell()
        code = _wait(command, environment, log.fileno(), left_s)
    said = (
        (out / "gpu.log").read_bytes()[start:].decode(errors="replace").replace(f"{ROOT}/", "").replace(f"{out}/", "").splitlines()
    )
    row: Row = {"state": LATE if code is None else FAILED if code else DONE, "limit_s": left_s, "seconds": time.monotonic() - began}
    if part.result and (out / part.result).exists():
        row["result"] = part.result
    if code:
        row["exit"] = code
        row["reason"] = next((line.strip() for line in reversed(said) if line.strip()), f"exit {code}")
    if code != 0 or not part.result:
        row["said"] = said[-SAID_LINES:]
    return row


def _wait(command: list[str], environment: dict[str, str], log: int, limit_s: float) -> int | None:
    """Its exit status; None where the time was over. Processes that it started end with it."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return child.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _line(found: Row) -> str:
    seconds = f", {found['seconds']:.0f} s" if "seconds" in found else ""
    reason = f": {found['reason']}" if "reason" in found else ""
    return f"{found['state']}{seconds}{reason}"


if __name__ == "__main__":
    sys.exit(main())
