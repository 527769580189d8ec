"""How fast records are prepared, planned and read: ours and others, interleaved, on one core."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import data_peers as peers
import numpy as np
from data_corpus import ALIGNMENTS, Corpus, made_up_lengths, one_epoch, token_lists, write_shuffled
from data_mixing import LENGTHS
from measure import Row, Timing, interleaved

from h3scale.config.data import Data, Hygiene
from h3scale.data.loader import TypedLoader
from h3scale.data.packing import pack
from h3scale.data.planner import Planner
from h3scale.data.prepare import prepare
from h3scale.data.sources import read_records

ROWS = 8  # a batch
PLANNED = 600_000  # records
PLANNED_TINY = 6_000
COPIES = 16  # of each record: enough that starting processes is a small part


def packed_tokens(corpus: Corpus, tiny: bool) -> list[Row]:
    """Tokens a second from the prepared store to tensors; padding is not counted."""
    rounds, lists = 2 if tiny else 9, token_lists(corpus.store)
    assert sum(map(len, lists)) == int(corpus.store.lengths.sum())
    rows: list[Row] = []
    for length in LENGTHS:
        loader = _loader(corpus, length)
        works: dict[str, Callable[[], int]] = {"ours, 7 tensors": lambda loader=loader: _ours(loader)}
        per_batch = max(round(ROWS * length * len(lists) / sum(map(len, lists))), 1)
        works["DataCollatorWithFlattening, 3 tensors"] = lambda count=per_batch: _flattened(lists, count)
        if not peers.missing("trl"):
            packed = peers.trl_packed({"input_ids": lists}, length)
            works["TRL bfd data set and its collator, 5 tensors"] = lambda packed=packed: peers.trl_collated(packed, ROWS)
            works["TRL bfd data set, set_format torch, ids alone"] = lambda packed=packed: _iterated(packed)
        batch = loader.tensors(loader.batch(0).rows, 0)
        arrays = [tensor.numpy() for tensor in vars(batch).values()]
        works["floor: np.copy of our batch's bytes"] = lambda arrays=arrays, loader=loader: _copied(arrays, loader)
        tokens = {name: work() for name, work in works.items()}
        timings = interleaved(works, rounds)
        rows += [_speed(name, length, tokens[name], timing, timings["ours, 7 tensors"], tokens["ours, 7 tensors"])
                 for name, timing in timings.items()]  # fmt: skip
        if peers.missing("trl"):
            rows.append({"what": "TRL bfd data set and its collator", "not_run": peers.missing("trl")})
    return rows


def prepare_speed(corpus: Corpus, tiny: bool) -> list[Row]:
    """JSON lines to a finished store, beside nothing but tokenizing the same texts, which are rendered and in memory."""
    from transformers import AutoTokenizer

    fresh: list[Any] = []

    def load() -> None:  # a tokenizer remembers texts: the next round would be faster for that alone
        fresh[:] = [AutoTokenizer.from_pretrained(corpus.tokenizer_folder)]

    data = Data(records=list(corpus.paths), workers=1)
    one_by_one = data.model_copy(update={"hygiene": Hygiene(near_duplicates=None)})
    off = data.model_copy(update={"hygiene": Hygiene(exact_duplicates=False, near_duplicates=None)})
    works: dict[str, Callable[[], int]] = {
        "bare tokenizer": lambda: _bare(fresh[0], corpus.texts),
        "ours": lambda: _prepared(data, fresh[0]),
        "ours, near_duplicates off": lambda: _prepared(one_by_one, fresh[0]),
        "ours, hygiene off": lambda: _prepared(off, fresh[0]),
        "tokenizers encode_batch": lambda: _encoded(fresh[0], corpus.texts),
        "Datasets: load_dataset + map(render, tokenize)": lambda: _mapped(corpus, fresh[0]),
    }
    load()
    tokens = {name: work() for name, work in works.items()}
    same = [tokens[name] for name in works if not name.startswith("ours") or name.endswith("hygiene off")]
    assert len(set(same)) == 1, f"not the same tokens: {tokens}"
    timings = interleaved(works, 2 if tiny else 7, load)
    bare = timings["bare tokenizer"]
    return [
        {
            "what": name,
            "tokens": same[0],
            "tokens_per_cpu_s": same[0] / timing.best(),
            "ratio": bare.best() / timing.best(),
            "ratio_of_medians": bare.median() / timing.median(),
            **timing.figures(),
        }
        for name, timing in timings.items()
    ]


def prepare_at_scale(corpus: Corpus, tiny: bool) -> list[Row]:
    """Many records, as one would do it: the tokenizer with its own threads, `data prepare` with a process for each core."""
    from transformers import AutoTokenizer

    workers = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shuffled.jsonl"
        write_shuffled(path, corpus.records, 1 if tiny else COPIES)
        loaded = [AutoTokenizer.from_pretrained(corpus.tokenizer_folder)]
        texts = [loaded[0].apply_chat_template(record.messages, tokenize=False) for record in read_records([path])]
        data = Data(records=[str(path)], workers=workers)
        works: dict[str, Callable[[], int]] = {
            "bare tokenizer, its threads": lambda: _with_threads(loaded[0], texts),
            f"ours, {workers} workers": lambda: _prepared(data, loaded[0]),
        }

        def load() -> None:
            loaded[:] = [AutoTokenizer.from_pretrained(corpus.tokenizer_folder)]

        tokens = {name: work() for name, work in works.items()}
        timings = interleaved(works, 1 if tiny else 3, load)
        bare = timings["bare tokenizer, its threads"]
        return [
            {
                "what": name,
                "records": len(texts),
                "tokens": tokens[name],
                "tokens_per_wall_s": tokens[name] / timing.best("wall_s"),
                "ratio": bare.best("wall_s") / timing.best("wall_s"),
                "cpu_ratio": bare.best() / timing.best(),
                **timing.figures(),
            }
            for name, timing in timings.items()
        ]


def planner(corpus: Corpus, tiny: bool) -> list[Row]:
    """Records a second, from lengths and labels to rows."""
    count = PLANNED_TINY if tiny else PLANNED
    lengths, labels = made_up_lengths(count)
    listed = lengths.tolist()
    column = None if peers.missing("trl") else peers.list_column(np.zeros(int(lengths.sum()), np.int8), lengths)
    rows: list[Row] = []
    for length in LENGTHS:
        works: dict[str, Callable[[], list[Any]]] = {
            f"ours, {packing}": lambda length=length, packing=packing: _planned(lengths, labels, length, packing)
            for packing in ("mixed", "separate")
        }
        works["ours, pack() offline, no alignments"] = lambda length=length: pack(listed, length)
        if column is not None:
            works["TRL bfd, all at a time"] = lambda length=length: list(peers.trl_packed(column, length, None).data["seq_lengths"])
        made = {name: work() for name, work in works.items()}
        for name, found in made.items():
            left_out = count - sum(map(len, found))
            most = ROWS * length // lengths.min() if name in ("ours, mixed", "ours, separate") else 0  # an unfinished batch
            assert 0 <= left_out <= most, f"{name}: {left_out} of {count} records are in no row"
        timings = interleaved(works, 2 if tiny else 5)
        for name, timing in timings.items():
            figures = {"records_per_cpu_s": sum(map(len, made[name])) / timing.best(), "waste": _waste(made[name], lengths, length)}
            ratio = timing.best() / timings["ours, mixed"].best()
            rows.append({"what": name, "row_tokens": length, **figures, "ours_is_faster": ratio, **timing.figures()})
        if column is None:
            rows.append({"what": "TRL bfd, all at a time", "not_run": peers.missing("trl")})
    return rows


def _waste(rows: list[Any], lengths: np.ndarray, length: int) -> float:
    """Share of the rows' positions without a token; an epoch's rows hold all records but those of an unfinished batch."""
    ours = isinstance(rows[0], np.ndarray)  # record numbers; the others' rows hold every record
    tokens = lengths[np.concatenate(rows)].sum() if ours else lengths.sum()
    return 1 - float(tokens) / (len(rows) * length)


def _loader(corpus: Corpus, length: int) -> TypedLoader:
    steps = max(int(corpus.store.lengths.sum()) // (length * ROWS), 1)
    data = Data(records=list(corpus.paths), sequence_length=length, rows_per_batch=ROWS)
    return TypedLoader(corpus.store, data, seed=0, steps=steps)


def _ours(loader: TypedLoader) -> int:
    tokens = 0
    for step in range(loader.steps or 0):
        batch = loader.batch(step)
        loader.tensors(batch.rows, 0)
        tokens += loader.tokens_in(batch)
    return tokens


def _flattened(lists: list[list[int]], count: int) -> int:
    return sum(batch["input_ids"].numel() for batch in peers.flattened(lists, count))


def _iterated(packed: Any) -> int:
    ids = packed.select_columns(["input_ids"]).with_format("torch")
    return sum(sum(len(row) for row in batch["input_ids"]) for batch in ids.iter(ROWS))


def _copied(arrays: list[np.ndarray], loader: TypedLoader) -> int:
    for _ in range(loader.steps or 0):
        for array in arrays:
            np.copy(array)
    return (loader.steps or 0) * ROWS * loader.length


def _speed(what: str, length: int, tokens: int, timing: Timing, ours: Timing, our_tokens: int) -> Row:
    rate = tokens / timing.best()
    return {
        "what": what,
        "row_tokens": length,
        "tokens": tokens,
        "tokens_per_cpu_s": rate,
        "tokens_per_wall_s": tokens / timing.best("wall_s"),
        "ours_is_faster": our_tokens / ours.best() / rate,
        **timing.figures(),
    }


def _bare(tokenizer: Any, texts: list[str]) -> int:
    parts = (texts[first : first + 1000] for first in range(0, len(texts), 1000))
    return sum(len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False)["input_ids"])


def _encoded(tokenizer: Any, texts: list[str]) -> int:
    parts = (texts[first : first + 1000] for first in range(0, len(texts), 1000))
    encodings = itertools.chain.from_iterable(tokenizer.backend_tokenizer.encode_batch(p, add_special_tokens=False) for p in parts)
    return sum(map(len, encodings))


def _with_threads(tokenizer: Any, texts: list[str]) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return _bare(tokenizer, texts)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _prepared(data: Data, tokenizer: Any) -> int:
    with TemporaryDirectory() as folder:
        return int(prepare(data, tokenizer, folder).starts[-1])


def _mapped(corpus: Corpus, tokenizer: Any) -> int:
    with TemporaryDirectory() as folder:
        return peers.mapped_tokens(corpus.paths, tokenizer, Path(folder))


def _planned(lengths: np.ndarray, labels: np.ndarray, length: int, packing: str) -> list[np.ndarray]:
    """The rows of one epoch in global batches, as the loader asks for them; a last one that does not fill up is left out."""
    data = Data(records=["made-up"], sequence_length=length, rows_per_batch=ROWS, packing=packing)
    planning = Planner(lengths, labels, one_epoch(data, lengths, labels), capacity=length, seed=0, separate=packing == "separate")
    rows = [row for batch in planning.batches(ROWS) for row in batch]
    assert len(planning.ended) == len(ALIGNMENTS)
    return rows
