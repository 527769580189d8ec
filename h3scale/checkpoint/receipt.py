"""A receipt of what was written: where every tensor came from, its sha256, and proof that each expert arrived once.

The JSON: `about` (source, kind, step, topology), `files` (sha256 of every other file, of safetensors files the header),
`tensors` (for each: file, dtype, shape, sha256; `from`: a list, in the order of the bytes, of the tensors of the hub layout that
it holds (`name`), each with the tensor of the source that it was in, the expert there, and the runs of bytes [file, offset,
length] that it is, or that it was computed of; `sha256_read` and `dtype_read` where the bytes were changed), `experts` (how many
layers, experts and matrices, and how many matrices arrived). It has no times in it: the same work gives the same receipt.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from h3scale.checkpoint.extents import BLOCK_BYTES, Stored
from h3scale.checkpoint.headers import read_header
from h3scale.checkpoint.inside import file_inside
from h3scale.checkpoint.shard_files import CODES, ShardFile, header_of
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.stream import Hashes, Output, Piece
from h3scale.checkpoint.swaps import swapped
from h3scale.errors import DataError, MissingInputError
from h3scale.model import names

RECEIPT = "receipt.json"
_FORMAT = 1
_Run = tuple[str, int, int, str, str]  # file, offset, number of bytes, what they are in the checkpoint, and in the model
_KEYS = ("format", "about", "files", "tensors", "experts")


def make_receipt(
    folder: Path, about: dict[str, Any], shards: Sequence[ShardFile], outputs: dict[str, Output], hashes: Hashes
) -> dict[str, Any]:
    """The receipt of a folder whose files are all there."""
    tensors: dict[str, Any] = {}
    root = Path(about["source"])
    for shard in shards:
        for spec in shard.specs:
            output = outputs[spec.name]
            tensors[spec.name] = {
                "file": shard.name,
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "sha256": hashes[spec.name][0],
                "from": [_origin(piece, root) for piece in output.pieces],
            }
            if output.changes and isinstance(output.source, Stored):
                tensors[spec.name] |= {"dtype_read": CODES[output.source.dtype], "sha256_read": hashes[spec.name][1]}
    weights = {shard.name for shard in shards}
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in weights)
    files = {shard.name: {"header_sha256": hashlib.sha256(shard.header).hexdigest(), "bytes": shard.num_bytes} for shard in shards}
    files |= {name: {"sha256": sha256(folder / name)} for name in others}
    return {
        "format": _FORMAT,
        "about": about,
        "files": files,
        "tensors": tensors,
        "experts": _experts(tensors, about["model_type"]),
    }


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
        file = file_inside(folder, name, f"{folder / own}: names")
        if not file.is_file():
            findings.append(f"{file}: in {own}, but missing")
        elif "sha256" in entry:
            if sha256(file) != entry["sha256"]:
                findings.append(f"{file}: sha256 differs from {own}: the file has changed since it was written")
        else:
            header = read_header(file)
            hashes |= {} if header.findings else {tensor: _sha256_of(stored) for tensor, stored in header.tensors.items()}
            if file.stat().st_size != entry["bytes"] or hashlib.sha256(header_of(file)).hexdigest() != entry["header_sha256"]:
                findings.append(f"{file}: its size or its header differs from {own}: the file has changed since it was written")
    return findings + list(_changed(folder, receipt, hashes, own))


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


def _sha256_of(stored: Stored) -> str:
    """The sha256 of a tensor's bytes, read in blocks."""
    found = hashlib.sha256()
    for extent in stored.extents:
        with extent.path.open("rb") as opened:
            opened.seek(extent.offset)
            left = extent.num_bytes
            while left and (block := opened.read(min(BLOCK_BYTES, left))):
                found.update(block)
                left -= len(block)
    return found.hexdigest()


def _check_proof(path: Path, receipt: dict[str, Any]) -> list[str]:
    """Experts complete, and no byte of the source in two tensors; from the receipt alone."""
    findings = []
    experts = _experts(receipt["tensors"], receipt["about"]["model_type"])
    if experts != receipt["experts"]:
        findings.append(f"{path}: says {receipt['experts']}, but its tensors are {experts}")
    if (
        experts
        and experts["arrived"] != experts["layers"] * experts["experts"] * experts["matrices"]
        and not receipt["about"]["only"]
    ):
        findings.append(f"{path}: not every expert has arrived: {experts}")
    try:
        _check_runs(
            (file, start, length, _key(piece["tensor"], piece.get("expert"), piece["name"]), name)
            for name, entry in receipt["tensors"].items()
            for piece in entry["from"]
            for runs in (piece.get("bytes", []), *piece.get("made_of", {}).values())
            for file, start, length in runs
        )
    except DataError as error:
        findings += [f"{path}: {finding}" for finding in error.findings]
    return findings


def check_disjoint(outputs: dict[str, Output]) -> None:
    """DataError (65) when two tensors are to have bytes in common, but for those of one stored tensor: tied ones."""
    _check_runs(
        (str(extent.path), extent.offset, extent.num_bytes, _key(piece.tensor, piece.expert, piece.name), output.spec.name)
        for output in outputs.values()
        for piece in output.pieces
        for extent in piece.extents
    )


def _key(tensor: str, expert: int | None, name: str) -> str:
    """Of all that may be made of the same bytes, the same: tied tensors."""
    return tensor if expert is None else f"{tensor}:{name}"


def _check_runs(runs: Iterable[_Run]) -> None:
    ordered = sorted(runs)
    for one, other in pairwise(ordered):
        if one[0] == other[0] and other[1] < one[1] + one[2] and one[3] != other[3]:
            raise DataError(f"{other[4]} and {one[4]} are made of the same bytes, {one[0]} from {other[1]} on")


def _experts(tensors: dict[str, Any], model_type: str | None) -> dict[str, int]:
    """How many layers, experts and matrices of experts have arrived, and how many in all; none when dense."""
    moe = names.MOE.get(model_type or "")
    found: Counter[tuple[int, int, str]] = Counter()
    for name in (piece["name"] for entry in tensors.values() for piece in entry["from"]):
        for projection, template in (moe.hub_experts if moe else {}).items():
            numbers = names.match(template, name)
            if numbers is not None:
                found[numbers["layer"], numbers["expert"], projection] += 1
    if not found:
        return {}
    layers, experts, matrices = (len(set(column)) for column in zip(*found, strict=True))
    return {"layers": layers, "experts": experts, "matrices": matrices, "arrived": found.total()}


def _origin(piece: Piece, root: Path) -> dict[str, Any]:
    def runs(stored: Stored) -> list[list[Any]]:
        return [[os.path.relpath(extent.path, root), extent.offset, extent.num_bytes] for extent in stored.extents]

    origin: dict[str, Any] = {"name": piece.name, "tensor": piece.tensor}
    if piece.expert is not None:
        origin["expert"] = piece.expert
    if isinstance(piece.source, Stored):
        return origin | {"bytes": runs(piece.source)}
    return origin | {"made_of": {name: runs(stored) for name, stored in piece.source.inputs.items()}}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
