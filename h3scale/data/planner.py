"""Which records are in which row of which global batch: planned from lengths and labels alone, before anything is read.

A row is filled in two ways. Most of it are runs of each alignment's shuffled records, cut off by a search in their
summed lengths; the rest is chosen, record by record, from a small pool of waiting records, so that the row ends up
full. What an alignment got too much or too little in a row is made good in the next one.

Shape suffixes: N records, A alignments.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from h3scale.data.mixture import Mixture

SHORTEST_RUN = 2  # mean records: below that, choosing from the pool is as fast and fills better
CHOICE = 8  # pairs of records among which the best is taken at the end of a batch; more balance no better
POOL = 64  # waiting records of an alignment: enough that one or two of them fill the end of a row to the token


@dataclass
class _Stream:
    """One alignment's records, shuffled anew each epoch; the next epoch begins when the last one is used up.

    `sums[i]` are the tokens of the first i records of the epoch's order. Records leave the order from `cursor` on, into
    a row at once or into the pool, where `pool` keeps their lengths, oldest first, and `by_length` finds them.
    """

    label: int
    ids: np.ndarray
    lengths_N: np.ndarray
    seed: int
    left: int  # records that may still be taken; -1 for no limit
    epoch: int = 0
    cursor: int = 0
    used: int = 0  # tokens
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    pool: dict[int, int] = field(default_factory=dict)
    by_length: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mean_length = float(self.lengths_N[self.ids].mean()) if len(self.ids) else 0.0

    def refill(self) -> bool:
        """Fills the pool up once it is half empty; gives whether there is anything left to take."""
        if len(self.pool) > POOL // 2:
            return True
        if self.cursor == len(self.order):
            if self.pool:
                return True
            if self.left == 0:
                return False
            self._next_epoch()
        records = self.order[self.cursor : self.cursor + POOL - len(self.pool)]
        self.cursor += len(records)
        for record, length in zip(records.tolist(), self.lengths_N[records].tolist(), strict=True):
            self.pool[record] = length
            self.by_length.setdefault(length, []).append(record)
        return True

    def _next_epoch(self) -> None:
        order = self.ids[shuffled(len(self.ids), self.seed, self.label, self.epoch)]
        if 0 <= self.left < len(order):
            order = order[: self.left]
        if self.left > 0:
            self.left -= len(order)
        self.order, self.cursor, self.epoch = order, 0, self.epoch + 1
        self.sums = np.concatenate([[0], np.cumsum(self.lengths_N[order])])

    def run(self, budget: int) -> tuple[np.ndarray, int]:
        """The next records of the order that have at most `budget` tokens together, and their tokens."""
        first, before = self.cursor, int(self.sums[self.cursor])
        self.cursor = int(self.sums.searchsorted(before + budget, "right")) - 1
        size = int(self.sums[self.cursor]) - before
        self.used += size
        return self.order[first : self.cursor], size

    def take(self, record: int) -> int:
        """Takes a record out of the pool; gives its length."""
        length = self.pool.pop(record)
        same = self.by_length[length]
        same.remove(record)
        if not same:
            del self.by_length[length]
        self.used += length
        return length


def shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count) that only integer arithmetic decides: the same on every machine and numpy version.

    Sorts by splitmix64 of (seed, index).
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in seed:
            state = _mix(state + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
        return np.argsort(_mix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state), kind="stable")


def _mix(value):
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Planner:
    """Rows of one run, one after the other; see the module's beginning.

    lengths_N: tokens of each record, at most `capacity`. labels_N: its alignment; records below 0 are never taken.
    `separate`: one alignment a row.
    """

    def __init__(
        self, lengths_N: np.ndarray, labels_N: np.ndarray, mixture: Mixture, *, capacity: int, seed: int, separate: bool = False
    ):
        self.capacity, self.mixture, self.separate = capacity, mixture, separate
        self.streams = [
            _Stream(a, np.flatnonzero(labels_N == a), lengths_N, seed, int(mixture.max_records[a]))
            for a in range(len(mixture.alignments))
        ]
        self.planned = [0.0] * len(self.streams)
        self.ended: list[tuple[int, str]] = []  # (step, alignment) of those that reached their last epoch

    def batches(self, rows_per_batch: int) -> Iterator[list[np.ndarray]]:
        """Global batches of so many rows of record numbers, until every alignment has reached its last epoch.

        With `separate`, rows of one alignment lie side by side.
        """
        step = 0
        while True:
            shares = self.mixture.at(step).tolist()
            wanted = self._row_alignments(shares, rows_per_batch) if self.separate else [None] * rows_per_batch
            rows = []
            live: dict[int, float] = {}
            for number, alignment in enumerate(wanted, start=1):
                if not live or not all([self.streams[a].refill() for a in live]):
                    live = self._live(shares, step)
                if not live:
                    return
                rows.append(self._row(live, alignment, number == rows_per_batch))
            yield rows
            step += 1

    def _live(self, shares: list[float], step: int) -> dict[int, float]:
        """The alignments that have a share and records left, and their shares of 1."""
        live = {}
        for a, share in enumerate(shares):
            if share > 0:
                if self.streams[a].refill():
                    live[a] = share
                elif all(name != self.mixture.alignments[a] for _, name in self.ended):
                    self.ended.append((step, self.mixture.alignments[a]))
        total = sum(live.values())
        return {a: share / total for a, share in live.items()}

    def _row_alignments(self, shares: list[float], rows: int) -> list[int | None]:
        """The alignment of each row of a batch: share x rows, rounded up for those that are behind, down for the others."""
        exact = [share * rows for share in shares]
        counts = [int(value + 1e-9) for value in exact]
        behind = [self.planned[a] - self.streams[a].used + (exact[a] - counts[a]) * self.capacity for a in range(len(exact))]
        open_ = [a for a in range(len(exact)) if exact[a] - counts[a] > 1e-9]
        for a in sorted(open_, key=lambda a: (-behind[a], a))[: rows - sum(counts)]:
            counts[a] += 1
        return [a for a, count in enumerate(counts) for _ in range(count)]

    def _row(self, live: dict[int, float], alignment: int | None, balanced: bool) -> np.ndarray:
        """The records of the next row; with an alignment, of that one only, or of the one most behind when it has none left."""
        due = {a: self.planned[a] + share * self.capacity - self.streams[a].used for a, share in live.items()}
        if self.separate:
            alone = alignment if alignment in due else max(due, key=lambda a: (due[a], -a))
            assert alone is not None
            filled, room = self._fill({alone: 1.0}, {alone: float(self.capacity)}, False)
        else:
            filled, room = self._fill(live, due, balanced)
        for a, share in live.items():
            self.planned[a] += share * (self.capacity - room)
        return np.concatenate(filled)

    def _fill(self, live: dict[int, float], due: dict[int, float], balanced: bool) -> tuple[list[np.ndarray], int]:
        """Record numbers of a row, in parts, and the tokens left free. `due`: what each alignment should get."""
        room = self.capacity
        parts: list[np.ndarray] = []
        chosen: list[int] = []
        first = self.streams[max(due, key=lambda a: (due[a], -a))]
        oldest = next(iter(first.pool))  # the oldest waiting record of the alignment most due: none waits for long
        room -= first.take(oldest)
        chosen.append(oldest)
        due[first.label] -= self.capacity - room
        # A run stops half a record before its budget, on average; the pools choose best with 1.5 records of room.
        reserve = max(0.0, 1.5 / len(live) - 0.5)
        for a in live:
            stream = self.streams[a]
            budget = min(due[a], room) - reserve * stream.mean_length
            if budget >= SHORTEST_RUN * stream.mean_length:
                run, size = stream.run(int(budget))
                parts.append(run)
                room -= size
                due[a] -= size
        room = self._finish(live, due, room, chosen, balanced)
        parts.append(np.array(chosen, np.int64))
        return parts, room

    def _finish(self, live: dict[int, float], due: dict[int, float], room: int, chosen: list[int], balanced: bool) -> int:
        """Chooses from the pools until nothing fits any more; gives the tokens left free."""
        while room > 0:
            streams = {
                a: self.streams[a] for a in sorted(live, key=lambda a: -due[a]) if self.streams[a].pool or self.streams[a].refill()
            }
            found = self._oldest(streams, room)
            if not found and balanced:
                found = self._balanced(streams, room, due)
            found = found or self._exact(streams, room) or self._next(streams, room)
            if not found:
                return room
            for a, length in found:
                stream = self.streams[a]
                record = stream.by_length[length][0]
                stream.take(record)
                chosen.append(record)
                room -= length
                due[a] -= length
        return room

    def _oldest(self, streams: dict[int, _Stream], room: int) -> list[tuple[int, int]]:
        """While there is room for more than two records, the oldest waiting one of the alignment most due."""
        for a, stream in streams.items():
            length = next(iter(stream.pool.values()))
            return [(a, length)] if length <= room - 2 * stream.mean_length else []
        return []

    def _exact(self, streams: dict[int, _Stream], room: int) -> list[tuple[int, int]]:
        """One or two waiting records (alignment, length) that fill the room to the token; those most due first."""
        for a, stream in streams.items():
            if room in stream.by_length:
                return [(a, room)]
        return next(_pairs(streams, room), [])

    def _balanced(self, streams: dict[int, _Stream], room: int, due: dict[int, float]) -> list[tuple[int, int]]:
        """Two waiting records that fill the room to the token and leave every alignment nearest to what it should get."""

        now = {a: abs(tokens) for a, tokens in due.items()}

        def change(pair: list[tuple[int, int]]) -> float:
            (a, length), (b, rest) = pair
            if a == b:
                return abs(due[a] - room) - now[a]
            return abs(due[a] - length) - now[a] + abs(due[b] - rest) - now[b]

        return min(islice(_pairs(streams, room), CHOICE), key=change, default=[])

    def _next(self, streams: dict[int, _Stream], room: int) -> list[tuple[int, int]]:
        """The longest waiting record that fits, of the alignment that is most due and has one."""
        for a, stream in streams.items():
            fitting = [length for length in stream.by_length if length <= room]
            if fitting:
                return [(a, max(fitting))]
        return []


def _pairs(streams: dict[int, _Stream], room: int) -> Iterator[list[tuple[int, int]]]:
    """Two waiting records (alignment, length) that fill the room to the token; first those of the first streams."""
    for a, stream in streams.items():
        for length, same in stream.by_length.items():
            rest = room - length
            for b, other in streams.items():
                if rest in other.by_length and (rest != length or a != b or len(same) > 1):
                    yield [(a, length), (b, rest)]
