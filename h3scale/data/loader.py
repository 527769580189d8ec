"""Typed global batches: balanced by alignment, packed into rows, the same on any number of ranks.

The order of the records is a function of (records, seed) alone: a global batch is a list of rows, made without knowing
how many ranks there are; ranks only choose which rows are theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from h3scale.data.encode import Batch, Encoded, collate, target_weight
from h3scale.errors import DataError

LOOKAHEAD = 16  # records of an alignment among which one that still fits is looked for; none is ever skipped for good


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of indices into the encoded records, for one optimizer step over all ranks."""

    rows: list[list[int]]


@dataclass
class _Stream:
    """The records of one alignment, shuffled anew each epoch by (seed, alignment, epoch)."""

    indices: list[int]
    seed: tuple[int, int]
    epoch: int = 0
    waiting: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def fill(self) -> list[int]:
        """The next records to choose from; an epoch is used up before the next one begins."""
        if not self.order and not self.waiting:
            generator = np.random.default_rng((*self.seed, self.epoch))
            self.order = [self.indices[i] for i in generator.permutation(len(self.indices))]
            self.epoch += 1
        while self.order and len(self.waiting) < LOOKAHEAD:
            self.waiting.append(self.order.pop())
        return self.waiting


class TypedLoader:
    """Endless global batches of `rows_per_batch` rows of `length` tokens.

    balance: `tokens` (each alignment has used equally many tokens after every batch, to within a record), `records`
    (equally many records), or `none` (one stream of all). `alignments` gives the label order.
    Raises DataError (65) for an alignment without records and for records whose prompt fills a whole row.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        alignments: Sequence[str],
        *,
        seed: int,
        rows_per_batch: int,
        length: int,
        balance: str = "tokens",
        prompt_weight: float = 0.0,
    ):
        self.encoded, self.alignments = encoded, list(alignments)
        self.rows_per_batch, self.length = rows_per_batch, length
        self.balance, self.prompt_weight, self.seed = balance, prompt_weight, seed
        self.usable = [i for i, item in enumerate(encoded) if target_weight(item, length, 0.0) > 0]
        self.num_unusable = len(encoded) - len(self.usable)
        self.num_cut = sum(len(encoded[i].input_ids) > length for i in self.usable)
        missing = [a for a in self.alignments if all(encoded[i].record.alignment != a for i in self.usable)]
        if missing:
            raise DataError([f"alignment '{a}' has no records that fit into sequence_length = {length}" for a in missing])

    def batches(self) -> Iterator[GlobalBatch]:
        """Global batches from the first one on."""
        streams = self._streams()
        used = [0] * len(streams)
        while True:
            rows: list[list[int]] = [[] for _ in range(self.rows_per_batch)]
            room = [self.length] * self.rows_per_batch
            while (placed := self._place(streams, used, room)) is not None:
                row, index = placed
                rows[row].append(index)
            yield GlobalBatch(rows)

    def batch(self, rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
        """Tensors of some rows."""
        return collate(rows, self.encoded, self.alignments, self.length, pad_id, self.prompt_weight)

    def targets_in(self, batch: GlobalBatch) -> float:
        """What the LM loss of the whole global batch is divided by; known here, so that no collective is needed."""
        return sum(target_weight(self.encoded[i], self.length, self.prompt_weight) for row in batch.rows for i in row)

    def tokens_in(self, batch: GlobalBatch, role: str = "both") -> int:
        """Tokens of the whole global batch, padding excluded: of the prompts, of the responses, or both."""
        total = 0
        for row in batch.rows:
            for i in row:
                item = self.encoded[i]
                kept = min(len(item.input_ids), self.length)
                prompt = min(item.num_prompt_tokens, kept)
                total += {"both": kept, "prompt": prompt, "response": kept - prompt}[role]
        return total

    def _streams(self) -> list[_Stream]:
        if self.balance == "none":
            return [_Stream(self.usable, (self.seed, 0))]
        of = [[i for i in self.usable if self.encoded[i].record.alignment == a] for a in self.alignments]
        return [_Stream(indices, (self.seed, s)) for s, indices in enumerate(of)]

    def _place(self, streams: list[_Stream], used: list[int], room: list[int]) -> tuple[int, int] | None:
        """Puts the next record of the alignment that is furthest behind into the fullest row that takes it."""
        for s in sorted(range(len(streams)), key=lambda s: (used[s], s)):
            waiting = streams[s].fill()
            for position, index in enumerate(waiting):
                need = min(len(self.encoded[index].input_ids), self.length)
                fitting = [r for r, left in enumerate(room) if left >= need]
                if fitting:
                    row = min(fitting, key=lambda r: (room[r], r))
                    room[row] -= need
                    used[s] += need if self.balance == "tokens" else 1
                    waiting.pop(position)
                    return row, index
        return None


def rows_of_rank(batch: GlobalBatch, rank: int, world_size: int, rows_per_micro_batch: int) -> list[list[list[int]]]:
    """The micro-batches of one rank: the global rows dealt out in order, micro-batch by micro-batch over the ranks."""
    micro_batches = [batch.rows[i : i + rows_per_micro_batch] for i in range(0, len(batch.rows), rows_per_micro_batch)]
    return micro_batches[rank::world_size]
