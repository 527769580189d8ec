"""The largest micro-batch, before the first step: what does not fit says so at once, and says what to change."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import psutil
import torch

from h3scale.config.recipe import TrainRecipe
from h3scale.data.collate import PROMPT, RESPONSE, Batch
from h3scale.data.loader import TypedLoader
from h3scale.errors import ConfigError
from h3scale.model.router import membership_AE
from h3scale.topology import divisors
from h3scale.train.ballast import room_for_moments
from h3scale.train.engine import Run
from h3scale.train.guards import discarding
from h3scale.train.loss import Counts, compute_losses
from h3scale.train.loss_memory import LossMemory
from h3scale.train.metrics import GIB, memory_bytes

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")  # of a DeepSpeed engine
# What is said in any case of letters when there is nothing left, beside torch.OutOfMemoryError: by CUDA, its driver and NCCL,
# by torch's allocator on a CPU, by cuBLAS for its workspace, by the kernel.
WORDS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "cannot allocate memory")


def dry_run(recipe: TrainRecipe, run: Run, loader: TypedLoader, memory: LossMemory) -> None:
    """Full rows through forward and backward, and a step that is thrown away: weights, states and random numbers stay as they are.

    Two micro-batches where a step has several: the second finds the gradients of the first in memory, and no later one finds
    more. The optimizer's own step does not run; the room of its moments is taken by train.ballast. Every rank calls this.
    ConfigError (78) where memory does not suffice: it is the recipe that has to change.
    """
    engine = run.engine
    batch = fullest(recipe, run, loader)
    counts = Counts(float(batch.targets.numel()), batch.targets.numel())
    member_AE = membership_AE(run.expert_map, engine.device) if run.expert_map else None
    before = {name: getattr(engine, name) for name in COUNTERS}
    last = min(2, run.micro_batches) - 1
    engine.train()
    devices = [engine.device] if engine.device.type == "cuda" else []
    told, room = out_of_memory_told(recipe, run, "dry run"), room_for_moments(engine)
    with told, room, torch.random.fork_rng(devices), discarding(engine):
        for number in range(last + 1):
            engine.set_gradient_accumulation_boundary(number == last)
            losses = compute_losses(engine, batch, counts, recipe.router, loader.alignments, member_AE, 1, memory.balance)
            engine.backward(memory.attach(losses.total))
            if number == last:
                memory.close_step()
            engine.step()
    memory.undo_step()
    engine.set_gradient_accumulation_boundary(None)  # by counting again
    vars(engine).update(before)


def fullest(recipe: TrainRecipe, run: Run, loader: TypedLoader) -> Batch:
    """A micro-batch without padding, of the store's first tokens: two records a row, since packed rows need a mask."""
    rows, length = recipe.rows_per_micro_batch, recipe.data.sequence_length
    tokens = loader.records.tokens[: rows * length] & loader.records.id_mask
    ids_BS = torch.tensor(tokens.tolist()).repeat(-(-rows * length // len(tokens)))[: rows * length].view(rows, length)
    position_S = torch.arange(length) % -(-length // 2)
    role_S = torch.where(position_S < length // 4, PROMPT, RESPONSE).to(torch.int8)
    label_B = torch.arange(rows) % len(loader.alignments)
    return Batch(
        input_ids=ids_BS,
        position_ids=position_S.expand(rows, -1).contiguous(),
        targets=ids_BS.roll(-1, 1),
        target_weights=torch.ones(rows, length),
        alignment_ids=label_B.unsqueeze(1).expand(-1, length).contiguous(),
        roles=role_S.expand(rows, -1).contiguous(),
        record_ids=torch.zeros_like(ids_BS),
    ).to(run.engine.device)


@contextmanager
def out_of_memory_told(recipe: TrainRecipe, run: Run, where: str) -> Iterator[None]:
    """Within, running out of memory is a ConfigError (78): one line with how much there is and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        used, there, of = _memory(run.engine.device)
        asked = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        shape = f"micro-batches of {recipe.rows_per_micro_batch} x {recipe.data.sequence_length} tokens"
        raise ConfigError(
            f"{where}: out of memory on rank {run.rank} with {shape}: {used / GIB:.1f} of {there / GIB:.1f} GiB of the {of} taken "
            f"({asked[:200]}; works: {', '.join(remedies(recipe, run))})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on a GPU or a CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS))


def remedies(recipe: TrainRecipe, run: Run) -> list[str]:
    """What would make a micro-batch smaller, or the states of a rank, of what has not been done yet."""
    rows, zero = recipe.rows_per_micro_batch, run.engine.zero_offload_optimizer()
    found = [f"rows_per_micro_batch: {max(d for d in divisors(rows) if d < rows)}"] if rows > 1 else []
    found += ["activation_checkpointing: true"] if not recipe.activation_checkpointing else []
    experts = run.expert_map.num_experts if run.expert_map else 1
    larger = [d for d in divisors(gcd(experts, run.world_size)) if d > run.ep_size]
    found += [f"ep_size: {larger[0]}"] if larger else []
    found += ["ZeRO stage 3 in the ds_config"] if run.zero_stage < 3 else []
    found += ["offload_optimizer in the ds_config"] if zero is None and run.engine.device.type == "cuda" else []
    return [*found, f"a data.sequence_length below {recipe.data.sequence_length}", "more ranks"]


def _memory(device: torch.device) -> tuple[int, int, Any]:
    """Bytes that tensors have taken at most (on a CPU: the process now), those that there are, and of what."""
    if device.type == "cuda":
        return memory_bytes(device), torch.cuda.mem_get_info(device)[1], "GPU"
    return memory_bytes(device), psutil.virtual_memory().total, "machine"
