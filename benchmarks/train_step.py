"""Training steps of a fused model beside others: python benchmarks/train_step.py [--tiny] [--only NAME,...] [--out FILE] [--dirty].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch and tokenizers start threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from layers_and_steps import run

if torch.cuda.is_available():  # of a row, before train_models is imported, here and in the ranks
    os.environ.setdefault("BENCHMARK_ROW_TOKENS", "4096")

SUBJECTS = {"ceilings": "moe_speed:ceilings", "step": "step_speed:step"}

if __name__ == "__main__":
    run("train_step.py", __doc__, SUBJECTS)
