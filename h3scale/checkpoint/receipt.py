"""A receipt of what was written: where every tensor came from, its sha256, and proof that each expert arrived once.

The JSON: `about` (source, kind, step, topology), `files` (sha256 of every other file; of weights files of all that is no
value of a tensor: of safetensors files the header, of torch.save's what is around `values`, [offset, length]),
`tensors` (for each: file, dtype, shape, sha256; `from`: a list, in the order of the bytes, of the tensors of the hub layout that
it holds (`name`), each with the tensor of the source that it was in, the expert there, and the runs of bytes [file, offset,
length] that it is, or that it was computed of; `shares` where the source stored it once with another; `sha256_read` and
`dtype_read` where the bytes were changed, piece by piece where they were computed), `experts` (how many layers, experts and
matrices, and how many matrices arrived exactly once). It has no times in it: the same work gives the same receipt.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from h3scale.checkpoint.extents import Extent, Stored
from h3scale.checkpoint.headers import read_header
from h3scale.checkpoint.inside import path_inside
from h3scale.checkpoint.proof import check_receipt_runs, experts_in, not_arrived
from h3scale.checkpoint.shard_files import CODES, ShardFile, header_of
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.stream import Hashes, Output, Piece, inputs_of
from h3scale.checkpoint.swaps import swapped
from h3scale.errors import DataError, MissingInputError

RECEIPT = "receipt.json"
_FORMAT = 1
_KEYS = ("format", "about", "files", "tensors", "experts")


def make_receipt(
    folder: Path, about: dict[str, Any], shards: Sequence[ShardFile], outputs: dict[str, Output], hashes: Hashes
) -> dict[str, Any]:
    """The receipt of a model folder whose files are all there."""
    root = Path(about["source"])
    tensors = {
        spec.name: tensor_entry(outputs[spec.name], shard.name, hashes[spec.name], root) for shard in shards for spec in shard.specs
    }
    weights = {shard.name for shard in shards}
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in weights)
    files = {shard.name: {"header_sha256": hashlib.sha256(shard.header).hexdigest(), "bytes": shard.num_bytes} for shard in shards}
    files |= {name: {"sha256": sha256(folder / name)} for name in others}
    return receipt_of(about, files, tensors)


def receipt_of(about: dict[str, Any], files: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """A receipt of these files and tensors, with its count of the experts."""
    experts = experts_in(tensors, about["model_type"])
    return {"format": _FORMAT, "about": about, "files": files, "tensors": tensors, "experts": experts}


def tensor_entry(output: Output, file: str, hashed: list[str], root: Path) -> dict[str, Any]:
    """What a receipt says of a tensor in `file`. `hashed`: as in Hashes; `root`: whence the source's files are named."""
    read = iter([] if isinstance(output.source, Stored) else hashed[1:])  # of a computed tensor, of each that it is made of
    entry: dict[str, Any] = {
        "file": file,
        "dtype": CODES[output.spec.dtype],
        "shape": list(output.spec.shape),
        "sha256": hashed[0],
        "from": [_origin(piece, root, read) for piece in output.pieces],
    }
    if output.changes and isinstance(output.source, Stored):
        entry |= {"dtype_read": CODES[output.source.dtype], "sha256_read": hashed[1]}
    return entry


def check_receipt(path: Path, folder: Path | None = None) -> tuple[int, list[str]]:
    """How many tensors a receipt proves, and what is wrong with it or with the model beside it, file by file.

    Needs the model only, not what it was made from. `folder` is the model's, by default the one that the receipt names.
    Raises UnsafeError (77) when it names files outside of that.
    """
    receipt = read_json(path)
    if receipt.get("format") != _FORMAT or any(key not in receipt for key in _KEYS):
        raise DataError(f"{path}: no receipt of h3scale checkpoint consolidate (format {receipt.get('format')})")
    try:
        folder = folder or path.parent / receipt["about"]["model"]
        if not folder.is_dir():
            raise MissingInputError(f"{path}: {folder}: no such model folder")
        findings = [*_check_proof(path, receipt), *_check_files(folder, receipt, path.name)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: a broken receipt ({error!r})") from error
    return len(receipt["tensors"]), findings


def _check_files(folder: Path, receipt: dict[str, Any], own: str) -> list[str]:
    findings = []
    hashes: dict[str, str] = {}  # of the tensors, as they are now
    for name, entry in receipt["files"].items():
        file = path_inside(folder, name, f"{folder / own}: names")
        if not file.is_file():
            findings.append(f"{file}: in {own}, but missing")
        elif "sha256" in entry:
            if sha256(file) != entry["sha256"]:
                findings.append(f"{file}: sha256 differs from {own}: the file has changed since it was written")
        else:
            header, found = _hash_values(file, name, entry)
            hashes |= found
            if file.stat().st_size != entry["bytes"] or header != entry["header_sha256"]:
                findings.append(f"{file}: its size or its header differs from {own}: the file has changed since it was written")
    return findings + list(_changed(folder, receipt, hashes, own))


def _hash_values(file: Path, name: str, entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The sha256 of what is no value in a weights file, and of each tensor; of none where these cannot be told apart."""
    if "values" in entry:
        at, num_bytes = map(int, entry["values"])
        found = {name: Stored((num_bytes,), torch.uint8, (Extent(file, at, num_bytes),))}
        is_whole, header = file.stat().st_size == entry["bytes"], sha256_around(file, at, num_bytes)
    else:
        safetensors = read_header(file)
        found = safetensors.tensors
        is_whole, header = not safetensors.findings, hashlib.sha256(header_of(file)).hexdigest()
    return header, {tensor: stored.sha256() for tensor, stored in found.items()} if is_whole else {}


def _changed(folder: Path, receipt: dict[str, Any], hashes: dict[str, str], own: str) -> Iterator[str]:
    """A line for each tensor that is not what it was, or for several that have changed places."""
    wanted = {name: entry["sha256"] for name, entry in receipt["tensors"].items()}
    changed = {name: found for name, found in hashes.items() if name in wanted and found != wanted[name]}
    sentences, explained = swapped(changed, wanted, receipt["about"]["model_type"])
    for sentence in sentences:
        yield f"{folder}: {sentence} (by the sha256 in {own})"
    for name in changed:
        if name not in explained:
            file = folder / receipt["tensors"][name]["file"]
            yield f"{file}: sha256 differs from {own} in {name}: the file has changed since it was written"


def _check_proof(path: Path, receipt: dict[str, Any]) -> list[str]:
    """Experts complete, and no byte of the source in two tensors; from the receipt alone."""
    findings = []
    tensors = receipt["tensors"]
    experts = experts_in(tensors, receipt["about"]["model_type"])
    if experts != receipt["experts"]:
        findings.append(f"{path}: says {receipt['experts']}, but its tensors are {experts}")
    findings += [
        f"{path}: {name} is said to be in '{entry['file']}', of which it has no sha256"
        for name, entry in tensors.items()
        if entry["file"] not in receipt["files"]
    ]
    if not receipt["about"]["only"]:
        findings += [f"{path}: {finding}" for finding in not_arrived(tensors, experts)]
    try:
        check_receipt_runs(tensors)
    except DataError as error:
        findings += [f"{path}: {finding}" for finding in error.findings]
    return findings


def _origin(piece: Piece, root: Path, read: Iterator[str]) -> dict[str, Any]:
    def runs(stored: Stored) -> list[list[Any]]:
        return [[os.path.relpath(extent.path, root), extent.offset, extent.num_bytes] for extent in stored.extents]

    origin: dict[str, Any] = {"name": piece.name, "tensor": piece.tensor}
    if piece.expert is not None:
        origin["expert"] = piece.expert
    if piece.shares is not None:
        origin["shares"] = piece.shares
    hashes = {name: found for name, found in zip(inputs_of(piece.source), read, strict=False)}
    if isinstance(piece.source, Stored):
        return origin | {"bytes": runs(piece.source)} | ({"sha256_read": hashes[""]} if hashes else {})
    made_of = {name: runs(stored) for name, stored in piece.source.inputs.items()}
    return origin | {"made_of": made_of} | ({"sha256_read": hashes} if hashes else {})


def sha256_around(path: Path, at: int, num_bytes: int) -> str:
    """The sha256 of a file without the bytes of the tensor that lies there."""
    after = at + num_bytes
    rest = max(path.stat().st_size - after, 0)
    return Stored((at + rest,), torch.uint8, (Extent(path, 0, at), Extent(path, after, rest))).sha256()


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
