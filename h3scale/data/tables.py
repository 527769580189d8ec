"""The rows of one Parquet file, CSV file or hub set, streamed through Hugging Face `datasets`: nothing is checked here.

`datasets` is imported when the first table is read, as it takes longer to import than most commands run.
"""

import csv
import glob
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from h3scale.data.lines import check_magic
from h3scale.errors import DataError, MissingInputError

NUM_ROWS = 1000  # read at a time


def read_table(path: str, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of a `parquet` or `csv` file. Cells of a CSV are texts, whatever they look like; empty ones are "".

    Raises DataError (65) for a file that is broken or is not what its name says, MissingInputError (66) for one that
    may not be read.
    """
    try:
        options = {"batch_size": NUM_ROWS} if kind == "parquet" else _csv_options(path)
        # A pattern is expected: a name with brackets would match nothing, in silence. The cache gets lock files only.
        with tempfile.TemporaryDirectory() as cache:
            files = glob.escape(str(Path(path).absolute()))
            yield from _load(kind, data_files=files, split="train", cache_dir=cache, **options)
    except (DataError, MissingInputError):
        raise
    except PermissionError as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not valid UTF-8 (works: UTF-8)") from None
    except Exception as error:  # Arrow, pandas and datasets raise a dozen classes that have no common parent
        raise DataError(f"{path}: not a whole {'Parquet' if kind == 'parquet' else 'CSV'} file ({_reason(error)})") from None


def read_hub(name: str, adapter: str | None, config: str | None, folder: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a hub set, without its being downloaded whole. Raises MissingInputError (66) whatever keeps it from us."""
    try:
        yield from _load(name, name=config, data_dir=folder, split=split)
    except Exception as error:  # the network, the hub, its client and datasets: a dozen classes again
        copy = f"path: FILE, adapter: {adapter}" if adapter else "path: FILE"
        raise MissingInputError(f"hub:{name}: cannot be read ({_reason(error)}; works: a local copy, {copy})") from None


def _load(path: str, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
    datasets.disable_progress_bars()
    yield from datasets.load_dataset(path, streaming=True, **options)


def _csv_options(path: str) -> dict[str, Any]:
    """What keeps pandas from guessing: every column is a text, and nothing stands for a missing value."""
    from datasets import Features, Value

    with Path(path).open("rb") as file:
        check_magic(path, file.read(4))
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file), [])
    if not columns:
        raise DataError(f"{path}: no records")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column '{twice[0]}' is there twice")
    features = Features({name: Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_filter": False, "chunksize": NUM_ROWS}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
