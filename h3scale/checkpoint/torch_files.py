"""Files of torch.save, opened without reading a tensor and without running anything: plain values, and where the bytes lie.

torch.load onto the device "meta" leaves in each storage its offset in the file (`_checkpoint_offset`: "Layout Control" in
torch's notes on serialization); the zip directory says independently what lies where, and both must agree.
"""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.extents import Extent, Stored
from h3scale.errors import DataError, StorageError, UnsafeError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: signature, ..., lengths of its name and of its extra field
_STORAGE = re.compile(r"[^/]+/data/\d+")
_PICKLE = b"\x80"  # what a pickle without a zip around it begins with
# Of torch.save's RuntimeErrors when the disk refuses. Most of them do not say why ("unexpected pos 160704 vs 160592").
_REFUSALS = ("inline_container.cc", "PytorchStreamWriter", "write(): fd", "Parent directory", "iostream error")


class TorchFile:
    """`states` is what was saved, tensors without values in it; `stored` says where a tensor's values are.

    Raises DataError (65) when the file is broken, UnsafeError (77) when its pickle wants more than plain values.
    """

    def __init__(self, path: Path):
        self.path = path
        self._sizes = _record_sizes(path)
        self.states = _load(path)

    def stored(self, tensor: torch.Tensor) -> Stored:
        """Where the values of a tensor of `states` are."""
        storage = tensor.untyped_storage()
        offset, size = storage._checkpoint_offset, tensor.dtype.itemsize
        if offset is None or not tensor.is_contiguous() or self._sizes.get(offset) != storage.nbytes():
            raise DataError(f"{self.path}: a tensor {tuple(tensor.shape)} does not lie where the zip directory has its values")
        first, num_bytes = int(tensor.storage_offset()) * size, tensor.numel() * size
        if first + num_bytes > storage.nbytes():
            raise DataError(f"{self.path}: a tensor {tuple(tensor.shape)} is longer than its values")
        extents = (Extent(self.path, offset + first, num_bytes),) if num_bytes else ()
        return Stored(tuple(tensor.shape), tensor.dtype, extents)

    def get(self, *keys: str) -> Any:
        """What lies under these keys; DataError (65) where there is nothing."""
        found = self.states
        for key in keys:
            if not isinstance(found, dict) or found.get(key) is None:
                raise DataError(f"{self.path}: has no '{'.'.join(keys)}', so this is no file of a DeepSpeed ZeRO checkpoint")
            found = found[key]
        return found


def _record_sizes(path: Path) -> dict[int, int]:
    """For every storage in the file: where it begins, and its size. Nothing in a file of torch.save is compressed."""
    sizes = {}
    try:
        with path.open("rb") as file:
            if file.read(1) == _PICKLE:
                raise UnsafeError(
                    f"{path}: a bare pickle; refused, because loading it could run code (works: torch.save's zip format)"
                )
            for record in zipfile.ZipFile(file).infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise DataError(f"{path}: '{record.filename}' is compressed, which torch.save never does")
                if not _STORAGE.fullmatch(record.filename):
                    continue
                file.seek(record.header_offset)
                signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if signature != b"PK\x03\x04":
                    raise zipfile.BadZipFile(f"no record at byte {record.header_offset}")
                sizes[record.header_offset + _LOCAL_HEADER.size + name_length + extra_length] = record.file_size
    except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable torch file ({error})") from error
    return sizes


class _Plain:
    """Stands for DeepSpeed's own small classes, of which only the attributes are wanted."""


class PlainLossScaler(_Plain):
    """Stands for one of DeepSpeed's loss scalers, by its name there."""


class LossScaler(PlainLossScaler): ...


class DynamicLossScaler(PlainLossScaler): ...


_ALLOWED: list[Any] = [  # all that a pickle may ask for beyond plain values and tensors; none of DeepSpeed's code is needed for it
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"'{wanted[1]}'" if wanted else "something that is no plain value"
        raise UnsafeError(f"{path}: its pickle wants {what}; refused, because loading it could run code") from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise DataError(f"{path}: not a readable torch file ({str(error).splitlines()[0][:200]})") from error


def save(states: Any, path: Path) -> None:
    """torch.save; StorageError (74) when the disk refuses."""
    try:
        torch.save(states, path)
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        raise StorageError(f"{path}: cannot be written: {not_whole(error)}") from error


def is_refusal(error: Exception) -> bool:
    """Whether torch.save raised this because the disk refused."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def not_whole(error: Exception) -> str:
    """What happened then, in words."""
    return f"torch could not write all of it ({next(iter(str(error).splitlines()), '')})"
