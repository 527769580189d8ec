"""What others do with the same records: the published code of H3Fusion, TRL, Transformers, Datasets.

Each peer is used as its own documentation or trainer does. One that is not installed is named with its reason.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PUBLISHED_CAP = 300  # H3Fusion cuts records there and pads every one of them to the longest
NOT_INSTALLED = "not installed"
STREAMING = "streaming-community"


def missing(package: str) -> str | None:
    """Why a peer cannot be run, or None."""
    return None if find_spec(package) else NOT_INSTALLED


def streaming_missing() -> str:
    """MosaicML Streaming mixes by records as interleave_datasets does; it does not import without its cloud packages."""
    if missing("streaming"):
        return NOT_INSTALLED
    return "no measurement is written for it (its import needs Brotli, python-snappy, zstd and clients of four clouds)"


def published_waste(lengths: np.ndarray, cap: int | None) -> tuple[float, float]:
    """(share of the positions that is padding, share of the tokens that is cut off) with every record padded to the longest."""
    kept = np.minimum(lengths, cap) if cap else lengths
    return 1 - float(kept.sum()) / (len(kept) * int(kept.max())), 1 - float(kept.sum() / lengths.sum())


def trl_packed(columns: dict[str, Any], length: int, batch_size: int | None = 1000) -> Any:
    """TRL's best-fit decreasing packing, within `batch_size` records at a time (SFTTrainer's: 1,000); None: all at once."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    dataset = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns)
    with quiet():
        return pack_dataset(dataset, length, "bfd", {"batch_size": batch_size})


def trl_rows(lengths: np.ndarray, order: np.ndarray, length: int, batch_size: int | None = 1000) -> list[np.ndarray]:
    """Record numbers of each row that TRL packs, the records taken in this order.

    Each record goes in as a list of its own number, so that a row says what is in it.
    """
    kept = np.minimum(lengths, length)[order]
    packed = trl_packed(list_column(np.repeat(order, kept), kept), length, batch_size)
    rows = packed["input_ids"]
    return [np.asarray(row)[np.cumsum([0, *sizes[:-1]])] for row, sizes in zip(rows, packed["seq_lengths"], strict=True)]


def trl_collated(packed: Any, rows_per_batch: int) -> int:
    """Tokens of all batches that SFTTrainer's padding-free collator makes of a packed data set."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    tokens = 0
    for first in range(0, len(packed), rows_per_batch):
        rows = packed[first : first + rows_per_batch]
        items = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        tokens += collator(items)["input_ids"].numel()
    return tokens


def list_column(values: npt.NDArray[Any], lengths: np.ndarray) -> Any:
    """A Datasets data set of one column of lists, `input_ids`, made without a Python object a token."""
    import pyarrow as pa
    from datasets import Dataset

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(values))}))


def interleaved_records(labels: np.ndarray, seed: int) -> np.ndarray:
    """Record numbers as datasets.interleave_datasets with equal probabilities gives them, until all were seen once."""
    from datasets import Dataset, interleave_datasets

    groups = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    datasets = [Dataset.from_dict({"record": group}).shuffle(seed=seed) for group in groups]
    equal = [1 / len(datasets)] * len(datasets)
    mixed = interleave_datasets(datasets, probabilities=equal, seed=seed, stopping_strategy="all_exhausted")
    return np.asarray(mixed["record"])


def flattened(lists: Sequence[list[int]], records_per_batch: int) -> Iterator[dict[str, Any]]:
    """Batches of Hugging Face's padding-free collator."""
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_tensors="pt")
    features = [{"input_ids": ids} for ids in lists]
    for first in range(0, len(features), records_per_batch):
        yield collator(features[first : first + records_per_batch])


def mapped_tokens(paths: Sequence[str], tokenizer: Any, folder: Path) -> int:
    """Tokens of JSON lines that are loaded, rendered and tokenized by Datasets; the files are written to `folder`."""
    import datasets

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(_rendered(rows, tokenizer), add_special_tokens=False))

    with quiet():
        loaded = datasets.load_dataset("json", data_files=list(paths), split="train", cache_dir=str(folder))
        encoded = loaded.map(encode, batched=True, remove_columns=loaded.column_names, load_from_cache_file=False)
    return sum(len(ids) for batch in encoded.with_format("arrow").iter(1000) for ids in batch["input_ids"])


def _rendered(rows: dict[str, list[str]], tokenizer: Any) -> list[str]:
    if "prompt" in rows:
        pairs = zip(rows["prompt"], rows["response"], strict=True)
    else:
        asked = [f"{a}\n\n{b}" if b else a for a, b in zip(rows["instruction"], rows["input"], strict=True)]
        pairs = zip(asked, rows["output"], strict=True)
    talks = [[{"role": "user", "content": said}, {"role": "assistant", "content": answer}] for said, answer in pairs]
    return tokenizer.apply_chat_template(talks, tokenize=False)  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of Datasets."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
