"""One number added over all nodes: `python -m h3scale.launch.collective INDEX TASKS NODE...`, which preflight starts on each.

The one module of launch that imports torch; nobody imports it.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from h3scale.errors import ConfigError, PeerLostError

LIMIT = timedelta(seconds=60)


def main(index: int, tasks: int, nodes: list[str]) -> int:
    """Exit code of the node; what is wrong on stderr, by node 0 where all know it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error after the limit, not an abort
    try:
        store = dist.TCPStore(host, port, len(nodes), is_master=index == 0, timeout=LIMIT)
        store.set(f"gpus-{index}", str(torch.cuda.device_count()))
        counts = {name: int(store.get(f"gpus-{other}")) for other, name in enumerate(nodes)}
        short = [f"{name}: {count} GPUs for {tasks} tasks" for name, count in counts.items() if count < tasks]
        if any(counts.values()) and short:  # without any GPU at all it is a run on CPUs
            for line in short if index == 0 else []:
                print(f"error: {line} (works: --gpus-per-node={tasks}, or a job without that node: --exclude)", file=sys.stderr)
            return _left(ConfigError.exit_code, store, index, nodes)
        device = torch.device("cuda" if any(counts.values()) else "cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=LIMIT, store=store, rank=index, world_size=len(nodes))
        number = torch.full((1,), float(index), device=device)
        dist.all_reduce(number)
        if number.item() != sum(range(len(nodes))):
            print(f"error: {nodes[index]}: a sum over all nodes is wrong ({number.item()})", file=sys.stderr)
            return PeerLostError.exit_code
    except (RuntimeError, dist.DistError) as error:
        print(f"error: {nodes[index]}: no collective over {host}:{port} ({str(error).splitlines()[0]})", file=sys.stderr)
        return PeerLostError.exit_code
    return _left(0, store, index, nodes)


def _left(code: int, store: dist.TCPStore, index: int, nodes: list[str]) -> int:
    """The code, when all nodes have read what they need: the store ends with node 0."""
    store.set(f"left-{index}", "1")
    if index == 0:
        store.wait([f"left-{other}" for other in range(len(nodes))])
    return code


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stderr.flush()
    os._exit(code)  # torch's threads need not be asked
