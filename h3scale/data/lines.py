"""The lines of one JSONL file as bytes, in bounded memory: nothing is parsed here."""

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import cast

from h3scale.errors import DataError, MissingInputError

MAX_LINE_BYTES = 16 * 2**20
SKIP_BYTES = 2**16  # of a line that is too long, at a time
BOM = b"\xef\xbb\xbf"
# What people give a wrong ending: the bytes it begins with, its name, what works.
MAGIC = ((b"\x1f\x8b", "gzip", "a name that ends with .jsonl.gz"), (b"PAR1", "Parquet", "a name that ends with .parquet"))


def read_lines(path: str, packed: bool) -> Iterator[bytes | str]:
    """Every line with its line end; a str instead says what is wrong with a line that was too long to be read.

    `packed`: the file is gzip. Lines end with a newline byte only, so a U+2028 inside a text ends none. Raises DataError
    (65) for a file that is not what its name says or whose gzip stream is broken, MissingInputError (66) for one that
    may not be read.
    """
    try:
        plain = Path(path).open("rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from None
    with plain:
        if not packed:
            check_magic(path, plain.peek(4))
            yield from _lines(plain)
            return
        try:
            yield from _lines(cast(BufferedReader, gzip.GzipFile(fileobj=plain)))
        except EOFError:
            raise DataError(f"{path}: the gzip stream has no end: the file was cut off") from None
        except gzip.BadGzipFile:
            raise DataError(f"{path}: not a gzip file (works: a name that ends with .jsonl, if it is not packed)") from None
        except zlib.error as error:
            raise DataError(f"{path}: a damaged gzip file ({error})") from None


def check_magic(path: str, head: bytes) -> None:
    """Raises DataError (65) where the first bytes tell of another format than the file's ending does."""
    for magic, name, works in MAGIC:
        if head.startswith(magic):
            raise DataError(f"{path}: a {name} file with another ending (works: {works})")


def _lines(file: BufferedReader) -> Iterator[bytes | str]:
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(BOM)
    while line:
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            yield f"a line of {_skip(file, len(line)):,} bytes (works: at most {MAX_LINE_BYTES:,})"
        else:
            yield line
        line = file.readline(MAX_LINE_BYTES + 1)


def _skip(file: BufferedReader, num_bytes: int) -> int:
    """Goes to the end of a line of which `num_bytes` are read; how long it is without its line end."""
    while piece := file.readline(SKIP_BYTES):
        if piece.endswith(b"\n"):
            return num_bytes + len(piece) - 1
        num_bytes += len(piece)
    return num_bytes
