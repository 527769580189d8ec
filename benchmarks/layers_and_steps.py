"""What moe_layer.py and train_step.py share: their words, the machine with its device, and a clean tree behind every result."""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name

from measure import Row, command_line, machine, print_table, subjects_of, versions, write_result

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "megablocks", "stanford-stk", "grouped-gemm")


def run(script: str, about: str | None, subjects: Mapping[str, str]) -> None:
    """The whole command. A result that is kept names the commit that it is of: a changed tree is refused, but for --dirty."""
    import torch

    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--dirty", action="store_true", help="write a result of a tree that differs from its commit")
    words = subjects_of(parser, subjects)
    found = versions(PACKAGES)
    if words.out and not words.dirty and (found["h3scale"] == "unknown" or found["h3scale"].endswith("+")):
        parser.error("--out: h3scale/ differs from its commit (commit it, or --dirty)")
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    result: Row = {"command": command_line(script, (words.out,)), "machine": {**machine(), "device": device}}
    result |= {"versions": {**found, "cuda": torch.version.cuda}, "subjects": {}}
    for name in words.only:
        result["subjects"][name] = _subject(name, subjects[name], words.tiny)
    if words.out:
        write_result(words.out, result)


def _subject(name: str, place: str, tiny: bool) -> Row:
    """Runs it in a folder of its own, which is deleted, and prints its table."""
    work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-"))
    began, load = time.perf_counter(), os.getloadavg()[0]
    try:
        rows = resolve_name(place)(tiny, work)
    finally:
        shutil.rmtree(work)
    about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
    print_table(name, rows, about)
    return {**about, "rows": rows}
