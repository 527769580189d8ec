"""Steps whose loss or gradient is not finite: found on every rank, left out on all of them, written down.

DeepSpeed 0.19.8 skips such a step by the norm of its gradients, but not without ZeRO in fp32, nor where a ds_config has
check_grad_overflow off; it knows nothing of what the losses remember, and says not which records it was. So the ranks agree
here, before the optimizer's step, and DeepSpeed's own way to skip is taken.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from h3scale.errors import StorageError
from h3scale.log import logger

QUANTITIES = ("loss", "drift", "gradient")
SHOWN = 3  # records that a warning names

NotFinite = dict[str, list[int]]  # quantity -> ranks


class FiniteCheck:
    """Whether the losses and gradients of one step are finite. Nothing waits for the device before `close`."""

    def __init__(self, device: torch.device):
        self.bad_Q = torch.zeros(len(QUANTITIES), dtype=torch.int32, device=device)

    def see(self, quantity: str, value: Tensor) -> None:
        """One of QUANTITIES, a tensor of any shape."""
        self.bad_Q[QUANTITIES.index(quantity)] += ~torch.isfinite(value.detach()).all().to(self.bad_Q.device)

    def close(self, engine: Any) -> NotFinite:
        """What is not finite and on which ranks, the same on every rank. After the last backward, before engine.step.

        One all-reduce of a few numbers a rank. A gradient is looked at where DeepSpeed has put it: the reduced one, so the
        ranks are those that hold a part of it; under ZeRO-2 and 3 with offload by the norms which are there already.
        """
        from deepspeed.runtime.utils import has_inf_or_nan

        for gradient in local_gradients(engine):
            self.see("gradient", gradient) if gradient.ndim == 0 else self._count(has_inf_or_nan(gradient))
        every_RQ = self.bad_Q.new_zeros(dist.get_world_size(), len(QUANTITIES))
        every_RQ[dist.get_rank()] = self.bad_Q
        dist.all_reduce(every_RQ)
        ranks = {quantity: every_RQ[:, q].nonzero().flatten().tolist() for q, quantity in enumerate(QUANTITIES)}
        return {quantity: found for quantity, found in ranks.items() if found}

    def _count(self, bad: Tensor) -> None:
        self.bad_Q[QUANTITIES.index("gradient")] += bad.to(self.bad_Q)


def local_gradients(engine: Any) -> Iterator[Tensor]:
    """This rank's gradients at the accumulation boundary, or (scalars) their norms where they are offloaded."""
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        yield from (torch.as_tensor(norm) for norm in optimizer.norm_for_param_grads.values())
    elif hasattr(optimizer, "averaged_gradients"):  # ZeRO-1 to 3
        yield from (gradient for group in optimizer.averaged_gradients.values() for gradient in group or ())
    elif hasattr(optimizer, "fp32_groups_gradients_flat"):  # ZeRO-1 of bf16 with sums in fp32
        yield from optimizer.fp32_groups_gradients_flat
    else:
        yield from (parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None)


@contextmanager
def discarding(engine: Any) -> Iterator[None]:
    """Within, engine.step throws the gradients away: the weights and the optimizer's state are as if there had been none.

    It is what DeepSpeed does itself after an overflow in fp16. To be entered by all ranks.
    """
    optimizer = engine.optimizer

    def overflow(*_: Any, **__: Any) -> None:
        optimizer.overflow = True

    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # ZeRO-3
        replaced: dict[str, Any] = {"_overflow_check_and_loss_scale_update": overflow}
    elif hasattr(optimizer, "check_grad_overflow"):  # ZeRO-1 and 2
        replaced = {"check_grad_overflow": True, "check_overflow": overflow}
    else:  # engine.step itself clears the gradients after that
        replaced = {"step": getattr(optimizer, "clear_hp_grads", lambda: None)}
    own = {name: vars(optimizer)[name] for name in replaced if name in vars(optimizer)}
    vars(optimizer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(optimizer)[name]
        vars(optimizer).update(own)


def finish_step(engine: Any, not_finite: NotFinite) -> NotFinite:
    """engine.step at the accumulation boundary, without effect if anything is not finite; gives why it had none, if so.

    The squares of finite gradients may still overflow in the norm; that DeepSpeed sees on all ranks, and skips.
    """
    with discarding(engine) if not_finite else nullcontext():
        engine.step()
    if not_finite or engine.was_step_applied():
        return not_finite
    return {"gradient": list(range(dist.get_world_size()))}


class Skips:
    """Counts the steps that are left out, says so, and knows when it is enough. The same on every rank.

    `limit`: so many in a row are a run that has diverged. `path`: where rank 0 writes a line for each.
    """

    def __init__(self, limit: int, path: Path):
        self.limit, self.path = limit, path
        self.total = self.in_a_row = self.last_good = 0

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.limit

    def take(self, step: int, not_finite: NotFinite, records: Sequence[str]) -> dict[str, int]:
        """Notes a step, numbered from 1, and the places of its batch's records; gives what its line of metrics says of it."""
        if not not_finite:
            self.in_a_row, self.last_good = 0, step
            return {}
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if dist.get_rank() == 0:
            logger.warning("step %d is skipped: %s; records %s (%s)", step, _said(not_finite), _some(records), self.path.name)
            self._write({"step": step, "not_finite": not_finite, "records": list(records)})
        return {"skipped": 1, "skipped_steps": self.total}

    def state(self) -> dict[str, int]:
        """What a run has to keep of it."""
        return {"total": self.total, "in_a_row": self.in_a_row, "last_good": self.last_good}

    def resume(self, state: dict[str, int]) -> None:
        """Goes on from a `state`."""
        self.total, self.in_a_row, self.last_good = state["total"], state["in_a_row"], state["last_good"]

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error


def _said(not_finite: NotFinite) -> str:
    parts = [f"{quantity} on rank{'s' * (len(ranks) > 1)} {_some(ranks)}" for quantity, ranks in not_finite.items()]
    return f"{' and '.join(parts)} not finite"


def _some(items: Sequence[Any]) -> str:
    more = len(items) - SHOWN
    return ", ".join(str(item) for item in items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
