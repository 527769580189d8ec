"""One rank of a training run whose rank 1 stops (SIGSTOP) inside the experts of its second step, between two all-to-alls.

python -m tests.distributed.stop_in_expert RECIPE key=value ...
"""

import os
import signal
import sys

from h3scale import log
from h3scale.train import expert_compute
from h3scale.train.__main__ import main

CALLS_PER_STEP = 2 * 4  # layers x micro-batches of a rank


def stop_later() -> None:
    plain, calls = expert_compute.choose, [0]

    def choose(name: str) -> object:
        backend = plain(name)

        def compute(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] == CALLS_PER_STEP + 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            return backend(*arguments)

        return compute

    expert_compute.choose = choose


if __name__ == "__main__":
    if log.RANK == 1:
        stop_later()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
