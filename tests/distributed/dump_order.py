"""One rank: goes through global batches and writes what it got, row by row, and its state after every step.

python -m tests.distributed.dump_order STORE OUT STEPS
"""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from h3scale.config.data import Data
from h3scale.data.loader import TypedLoader, rows_of_rank
from h3scale.data.store import open_store

SETTINGS = {"records": ["x"], "sequence_length": 64, "rows_per_batch": 8, "weights": {"helpful": 2, "harmless": 1, "honest": 1}}
ROWS_PER_MICRO_BATCH = 2


def main(store: str, out: Path, steps: int) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = TypedLoader(open_store(store), Data.model_validate(SETTINGS), seed=5, steps=steps)
    path = out / "state.json"
    first = loader.resume(json.loads(path.read_text())) if path.exists() else 0
    for step in range(first, steps):
        micro_batches = rows_of_rank(loader.batch(step), rank, world_size, ROWS_PER_MICRO_BATCH)
        mine = []
        for rows in micro_batches:
            batch = loader.tensors(rows, pad_id=0)
            mine.append([batch.record_ids.tolist(), batch.input_ids.tolist(), batch.alignment_ids.tolist()])
        everyone: list = [None] * world_size
        dist.all_gather_object(everyone, mine)
        if rank == 0:
            dealt = [everyone[i % world_size][i // world_size] for i in range(world_size * len(mine))]
            partial = out / ".partial"
            partial.write_text(json.dumps(dealt))
            partial.rename(out / f"step-{step:04d}.json")
            partial.write_text(json.dumps(loader.state(step + 1)))
            partial.rename(path)
        time.sleep(0.02)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
