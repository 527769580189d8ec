"""How full the rows are, and how well every batch keeps its shares: ours and others on the same records."""

from collections.abc import Callable, Sequence

import data_peers as peers
import numpy as np
from data_corpus import Corpus
from measure import Row

from h3scale.config.data import Data
from h3scale.data.loader import TypedLoader
from h3scale.data.store import Tokens

LENGTHS = (2048, 4096)
BATCH_ROWS = (8, 32)
EPOCHS = 3  # of the largest alignment; the smaller ones repeat more often, as their shares are equal


def waste(corpus: Corpus, tiny: bool) -> list[Row]:
    """Share of the positions of fixed-size rows that hold no token."""
    lengths = corpus.store.lengths
    order = np.random.default_rng(0).permutation(len(lengths))
    rows: list[Row] = []
    for length in LENGTHS:
        for packing in ("mixed", "separate"):
            loader, steps = _loader(corpus, length, 8, packing)
            planned = loader.plan.rows(0, steps * 8)
            check_epochs(loader, planned)
            rows.append(_waste(f"ours, {packing}", length, loader.kept, planned))
        for batch_size in (1000, None):
            what = f"TRL bfd, {f'{batch_size:,} records' if batch_size else 'all'} at a time"
            rows.append(_or_not(what, peers.missing("trl"), lambda w=what, b=batch_size, c=length: _trl(w, c, lengths, order, b)))
        rows.append(_flattened(length, lengths, order))
    for cap in (peers.PUBLISHED_CAP, None):
        share, cut = peers.published_waste(lengths, cap)
        what = f"H3Fusion as published, to the longest, {f'cap {cap}' if cap else 'no cap'}"
        rows.append({"what": what, "row_tokens": int(min(lengths.max(), cap or lengths.max())), "waste": share, "cut": cut})
    return rows


def shares(corpus: Corpus, tiny: bool) -> list[Row]:
    """Total variation distance between the token shares of a global batch and equal shares.

    `own`: the distance to the peer's own average instead, that is what no choice of weights would mend.
    """
    store, length = corpus.store, LENGTHS[0]
    order = np.random.default_rng(0).permutation(len(store))
    packed = None if peers.missing("trl") else peers.trl_rows(store.lengths, order, length)
    mixed = peers.interleaved_records(store.labels, seed=0)
    rows: list[Row] = []
    for batch_rows in BATCH_ROWS:
        for packing in ("mixed", "separate"):
            loader, steps = _loader(corpus, length, batch_rows, packing)
            batches = [loader.batch(step).records for step in range(steps)]
            rows.append(_distances(f"ours, {packing}", batch_rows, store, batches))
        what = "no scheduler: shuffled, TRL bfd, rows shuffled"
        rows.append(
            _or_not(what, peers.missing("trl"), lambda w=what, n=batch_rows: _distances(w, n, store, _grouped(packed or [], n)))
        )
        count = max(round(batch_rows * length * len(store) / store.lengths.sum()), 1)
        cuts = [mixed[first : first + count] for first in range(0, max(len(mixed) - count, 0) + 1, count)]
        rows.append(_distances("interleave_datasets, equal probabilities", batch_rows, store, cuts))
    rows.append({"what": f"{peers.STREAMING}, proportions", "not_run": peers.streaming_missing()})
    return rows


def check_epochs(loader: TypedLoader, rows: Sequence[np.ndarray]) -> None:
    """Every record of an alignment once before any of it comes again, and no row longer than it may be."""
    taken = np.concatenate(rows)
    labels = loader.records.labels[taken]
    for label, count in enumerate(loader.records_A.tolist()):
        mine = taken[labels == label]
        for first in range(0, len(mine) - count + 1, count):
            assert len(np.unique(mine[first : first + count])) == count, f"alignment {label}: not every record once an epoch"
        assert len(np.unique(mine[len(mine) // count * count :])) == len(mine) % count
    assert max(int(loader.kept[row].sum()) for row in rows) <= loader.length


def _loader(corpus: Corpus, length: int, batch_rows: int, packing: str) -> tuple[TypedLoader, int]:
    store = corpus.store
    tokens_A = np.bincount(store.labels, store.lengths)
    steps = int(np.ceil(EPOCHS * tokens_A.max() * len(tokens_A) / (length * batch_rows)))
    data = Data(records=list(corpus.paths), sequence_length=length, rows_per_batch=batch_rows, packing=packing)
    return TypedLoader(store, data, seed=0, steps=steps), steps


def _waste(what: str, length: int, kept: np.ndarray, rows: Sequence[np.ndarray]) -> Row:
    tokens = sum(int(kept[row].sum()) for row in rows)
    return {"what": what, "row_tokens": length, "waste": 1 - tokens / (len(rows) * length), "cut": 0.0, "rows": len(rows)}


def _trl(what: str, length: int, lengths: np.ndarray, order: np.ndarray, batch_size: int | None) -> Row:
    kept = np.minimum(lengths, length)
    rows = peers.trl_rows(lengths, order, length, batch_size)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths)))
    return {**_waste(what, length, kept, rows), "cut": 1 - float(kept.sum() / lengths.sum())}


def _flattened(length: int, lengths: np.ndarray, order: np.ndarray) -> Row:
    """Rows of as many records as fill `length` tokens on average: nothing is padded, but no two rows are of one size."""
    count = max(round(length * len(lengths) / lengths.sum()), 1)
    sizes = np.array([lengths[order[first : first + count]].sum() for first in range(0, len(order) - count + 1, count)])
    return {
        "what": "DataCollatorWithFlattening, fixed-size rows",
        "row_tokens": int(sizes.max()),
        "waste": 1 - float(sizes.mean() / sizes.max()),
        "cut": 0.0,
        "rows": len(sizes),
        "max_over_mean": float(sizes.max() / sizes.mean()),
    }


def _distances(what: str, batch_rows: int, store: Tokens, batches: Sequence[np.ndarray]) -> Row:
    tokens = np.array([np.bincount(store.labels[b], store.lengths[b], len(store.alignments)) for b in batches])
    found = tokens / tokens.sum(1, keepdims=True)
    equal = np.abs(found - 1 / found.shape[1]).sum(1) / 2
    own = np.abs(found - tokens.sum(0) / tokens.sum()).sum(1) / 2
    figures: Row = {"what": what, "rows_per_batch": batch_rows, "batches": len(batches)}
    for name, distance in (("equal", equal), ("own", own)):
        figures |= {f"{name}_mean": float(distance.mean()), f"{name}_p95": float(np.quantile(distance, 0.95))}
    return figures


def _grouped(rows: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Global batches of so many rows, in random order."""
    order = np.random.default_rng(1).permutation(len(rows))
    firsts = range(0, max(len(rows) - count, 0) + 1, count)
    return [np.concatenate([rows[i] for i in order[first : first + count]]) for first in firsts]


def _or_not(what: str, reason: str | None, run: Callable[[], Row]) -> Row:
    return {"what": what, "not_run": reason} if reason else run()
