"""A layer of experts beside others: python benchmarks/moe_layer.py [--tiny] [--only NAME,...] [--out FILE] [--dirty].

benchmarks/README.md says what is measured and how.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # before torch starts threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from layers_and_steps import run

from h3scale.train.load import freed_memory_returned

SUBJECTS = {name: f"moe_speed:{name}" for name in ("ceilings", "layer", "loads", "few_tokens")}

if __name__ == "__main__":
    with freed_memory_returned():
        pass  # from here on freed memory is kept for the next round as in a training run of h3scale's, for all contenders
    run("moe_layer.py", __doc__, SUBJECTS)
