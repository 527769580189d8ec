"""Typed global batches: balanced by alignment, packed into rows, the same on any number of ranks.

The order of the records is a function of (records, settings, seed) alone, made without knowing how many ranks there
are; ranks only choose which rows are theirs. Any step can be had at once, so the state of a run is its step.

Usable by itself:

    data = Data(records=["records/"], sequence_length=2048, rows_per_batch=64)
    loader = TypedLoader(prepare(data, tokenizer, "prepared"), data, seed=0)
    for batch in torch.utils.data.DataLoader(MicroBatches(loader, rank, world_size, 4, steps=1000), batch_size=None): ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h3scale.config.data import Data
from h3scale.data.collate import Batch, collate
from h3scale.data.mixture import Mixture, mixture
from h3scale.data.plan import Plan, make_plan, open_plan, plan_key
from h3scale.data.planner import Planner
from h3scale.data.store import Store, Tokens
from h3scale.errors import ConfigError, DataError
from h3scale.log import logger

ORDER = 1  # of the planner: another number, another order from the same seed
MAX_SHOWN = 20  # places of overlong records that are named
GROWTH = 256  # steps that a loader without a folder plans at once


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of record numbers, for one optimizer step over all ranks. separate: each row is of one alignment."""

    rows: list[np.ndarray]
    separate: bool = False

    @property
    def records(self) -> np.ndarray:
        return np.concatenate(self.rows)


class TypedLoader:
    """Global batches of `rows_per_batch` rows of `sequence_length` tokens, by step.

    `data` says how they are mixed (config.data.Data; the fields that say where records come from play no part).
    `alignments` gives the label order, the records' own by default; records of others are left out. With `steps`, the
    plan of so many is made at once, and of a prepared store it is kept in its folder for the next run.
    Raises DataError (65) for an alignment without records that fit, and for records that do not last for `steps`.
    """

    def __init__(
        self,
        records: Tokens,
        data: Data,
        *,
        seed: int,
        alignments: Sequence[str] | None = None,
        steps: int | None = None,
    ):
        self.alignments = list(alignments or records.alignments)
        self.records = records.relabelled(self.alignments)
        self.data, self.seed, self.steps = data, seed, steps
        self.length = data.sequence_length
        self.kept = np.minimum(self.records.lengths, self.length)
        self.kept_responses = self.records.responses_within(self.length)
        mine = self.records.labels >= 0
        self.usable = mine & (self.kept_responses > 0)
        self.num_unusable = int((mine & ~self.usable).sum())
        self.num_cut = int((self.usable & (self.records.lengths > self.length)).sum())
        labels = self.records.labels[self.usable]
        records_A = np.bincount(labels, minlength=len(self.alignments))
        missing = [a for a, count in zip(self.alignments, records_A, strict=True) if not count]
        if missing:
            raise DataError([f"alignment '{a}' has no records that fit into sequence_length = {self.length}" for a in missing])
        tokens_A = np.bincount(labels, self.kept[self.usable], len(self.alignments))
        self.records_A, self.tokens_A = records_A, tokens_A.astype(np.int64)
        self.mixture: Mixture = mixture(data, self.alignments, self.tokens_A, records_A)
        self.plan = self._plan(steps or GROWTH)
        if steps is not None and self.plan.num_rows < steps * data.rows_per_batch:
            last = self.plan.num_rows // data.rows_per_batch
            raise DataError(
                f"the records last for {last} of {steps} steps: every alignment has reached data.max_epochs "
                f"(works: steps = {last} or fewer, a higher max_epochs)"
            )

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the order: two loaders with the same one give the same batches."""
        shares = [(step, shares.tolist()) for step, shares in self.mixture.shares]
        source = self.records.manifest["content"] if isinstance(self.records, Store) else _digest(self.records)
        settings = (self.length, self.data.rows_per_batch, self.data.packing, self.seed, self.mixture.max_records.tolist())
        return plan_key(ORDER, source, self.alignments, shares, settings)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0. IndexError when the records do not last that long."""
        rows_per_batch = self.data.rows_per_batch
        if self.steps is None and (step + 1) * rows_per_batch > self.plan.num_rows:
            self.plan = self._plan(max(step + 1, 2 * self.plan.num_rows // rows_per_batch))
        if (step + 1) * rows_per_batch > self.plan.num_rows:
            raise IndexError(f"step {step}: the plan has {self.plan.num_rows // rows_per_batch} steps")
        return GlobalBatch(self.plan.rows(step * rows_per_batch, rows_per_batch), self.data.packing == "separate")

    def tensors(self, rows: Sequence[np.ndarray], pad_id: int) -> Batch:
        """Tensors of some rows."""
        return collate(rows, self.records, self.length, pad_id, self.data.prompt_weight)

    def targets_in(self, batch: GlobalBatch) -> float:
        """What the LM loss of the whole global batch is divided by; known here, so that no collective is needed."""
        responses = self.tokens_in(batch, "response")
        prompts = self.tokens_in(batch, "prompt") - len(batch.records)  # nothing predicts a record's first token
        return responses + self.data.prompt_weight * prompts

    def tokens_in(self, batch: GlobalBatch, role: str = "both") -> int:
        """Tokens of the whole global batch, padding excluded: of the prompts, of the responses, or both."""
        ids = batch.records
        responses = int(self.kept_responses[ids].sum())
        kept = int(self.kept[ids].sum())
        return {"both": kept, "prompt": kept - responses, "response": responses}[role]

    def tokens_by_alignment(self, batch: GlobalBatch) -> np.ndarray:
        """Tokens of each alignment in the whole global batch, (A,) int64."""
        ids = batch.records
        return np.bincount(self.records.labels[ids], self.kept[ids], len(self.alignments)).astype(np.int64)

    def check_lengths(self) -> None:
        """Says how many records sequence_length cuts or leaves out. DataError (65) when the recipe does not accept so many."""
        length, total = self.length, int((self.records.labels >= 0).sum())
        if self.num_cut:
            logger.warning("%d of %d records are longer than sequence_length = %d and cut there", self.num_cut, total, length)
        if not self.num_unusable:
            return
        said = f"{self.num_unusable} of {total} records are left out: their prompt fills sequence_length = {length}"
        if self.data.bad_records == "drop" and self.num_unusable <= self.data.max_bad * total:
            logger.warning(said)
            return
        overlong = np.flatnonzero((self.records.labels >= 0) & ~self.usable)[:MAX_SHOWN].tolist()
        store = self.records
        places = (
            [f"{store.where(i)}: the prompt fills sequence_length = {length}" for i in overlong] if isinstance(store, Store) else []
        )
        limit = "data.bad_records is stop" if self.data.bad_records == "stop" else f"data.max_bad is {self.data.max_bad:.2%}"
        raise DataError([*places, f"{said}, and {limit} (works: a longer data.sequence_length)"])

    def state(self, step: int) -> dict[str, Any]:
        """All that a run has to keep to go on after so many steps."""
        return {"step": step, "order": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """The step to go on at. DataError (65) when records or settings would now give another order."""
        if state["order"] != self.fingerprint:
            raise DataError(
                f"the run was at step {state['step']} of the order {state['order']}, but these records, tokenizer, seed or data "
                f"settings give {self.fingerprint} (works: the same ones, or a new run)"
            )
        return int(state["step"])

    def _plan(self, steps: int) -> Plan:
        folder = self.records.folder / "plans" / self.fingerprint if isinstance(self.records, Store) else None
        found = open_plan(folder, steps) if folder else None
        if found:
            return found
        try:
            return make_plan(self._planner(), self.data.rows_per_batch, steps, folder)
        except OSError as error:
            logger.warning("%s: the plan cannot be kept (%s), so it is made in memory", folder, error.strerror)
            return make_plan(self._planner(), self.data.rows_per_batch, steps)

    def _planner(self) -> Planner:
        labels = np.where(self.usable, self.records.labels, -1)
        separate = self.data.packing == "separate"
        return Planner(self.kept, labels, self.mixture, capacity=self.length, seed=self.seed, separate=separate)


class MicroBatches:
    """One rank's micro-batches, in order, as a map-style data set for torch's DataLoader (batch_size=None).

    Item i is the tensors of micro-batch i from `start_step` on; what it is depends on nothing else, so any number of
    DataLoader workers gives the same. ConfigError (78) where the rows of a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        loader: TypedLoader,
        rank: int,
        world_size: int,
        rows_per_micro_batch: int,
        *,
        steps: int,
        start_step: int = 0,
        pad_id: int = 0,
    ):
        if loader.data.rows_per_batch % (rows_per_micro_batch * world_size):
            raise ConfigError(
                f"rows_per_batch = {loader.data.rows_per_batch} is no multiple of {world_size} ranks x {rows_per_micro_batch} rows"
            )
        self.loader, self.rank, self.world_size = loader, rank, world_size
        self.rows, self.start_step, self.pad_id = rows_per_micro_batch, start_step, pad_id
        self.per_step = loader.data.rows_per_batch // (rows_per_micro_batch * world_size)
        self.steps = steps

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.per_step

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, part = divmod(index, self.per_step)
        batch = self.loader.batch(self.start_step + step)
        return self.loader.tensors(rows_of_rank(batch, self.rank, self.world_size, self.rows)[part], self.pad_id)


def rows_of_rank(batch: GlobalBatch, rank: int, world_size: int, rows_per_micro_batch: int) -> list[list[np.ndarray]]:
    """The micro-batches of one rank, so that none has a row too many or too few of any alignment.

    Mixed rows make up for each other one after the other, so a micro-batch is some consecutive rows. Separate rows of one
    alignment lie side by side, so they are dealt out like cards.
    """
    count = len(batch.rows) // rows_per_micro_batch
    if batch.separate:
        return [batch.rows[i::count] for i in range(rank, count, world_size)]
    return [batch.rows[i * rows_per_micro_batch : (i + 1) * rows_per_micro_batch] for i in range(rank, count, world_size)]


def _digest(records: Tokens) -> str:
    import hashlib

    state = hashlib.sha256(np.ascontiguousarray(records.tokens).tobytes())
    for array in (records.starts, records.labels):
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]
