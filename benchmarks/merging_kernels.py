"""The parts of merging by singular vectors, on one matrix: python benchmarks/merging_kernels.py [--tiny] [--out FILE] [--dirty].

On a GPU if there is one. benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch starts threads

from layers_and_steps import run

SUBJECTS = {"kernels": "merging_speed:kernels"}

if __name__ == "__main__":
    run("merging_kernels.py", __doc__, SUBJECTS)
