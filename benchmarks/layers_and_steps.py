"""What moe_layer.py, train_step.py and merging_kernels.py share: their words, the machine and its device, a clean tree."""

import argparse
import os
from collections.abc import Mapping
from pkgutil import resolve_name

from measure import run_subjects, subjects_of, versions

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "megablocks", "stanford-stk", "grouped-gemm")


def run(script: str, doc: str | None, subjects: Mapping[str, str]) -> None:
    """The whole command. A result that is kept names the commit that it is of: a changed tree is refused, but for --dirty."""
    import torch

    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--dirty", action="store_true", help="write a result of a tree that differs from its commit")
    words = subjects_of(parser, subjects)
    commit = versions(())["h3scale"]
    if words.out and not words.dirty and (commit == "unknown" or commit.endswith("+")):
        parser.error("--out: h3scale/ or benchmarks/ differs from its commit (commit it, or --dirty)")
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else os.environ.setdefault("DS_ACCELERATOR", "cpu")
    about = {"device": device, "cuda": torch.version.cuda}
    run_subjects(script, words, PACKAGES, lambda name, work: resolve_name(subjects[name])(words.tiny, work), about)
