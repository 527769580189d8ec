"""The files of a folder: weights and their index agree, nothing leads out of the folder, and no pickle lies in wait."""

import json
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from h3scale.checkpoint.adapter import ADAPTER_CONFIG
from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, error, unsafe, warning
from h3scale.checkpoint.inside import file_inside, leads_outside
from h3scale.checkpoint.shard_files import INDEX, WEIGHTS
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.torch_files import TorchFile
from h3scale.errors import UnsafeError

_MODEL_FILE = re.compile(r"model[^/]*\.safetensors")  # what a loader takes for the model's; other tools' files have other names
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".metadata", ".joblib")  # torch DCP's file is called .metadata
# What a pickle begins with, or needs to run code: the protocol, and in old ones, which have none, the names that they want.
_OPERATIONS = {"PROTO", "GLOBAL", "INST"}
_HEAD_BYTES = 1 << 16


def check_links(subject: Subject) -> Iterator[Finding]:
    """No link leads out of the folder."""
    for path in sorted(subject.path.rglob("*")):
        if path.is_symlink() and leads_outside(subject.path, path):
            yield unsafe(f"{path}: a link that leads outside the folder, to {path.resolve()} (works: the file itself)")


def check_headers(subject: Subject) -> Iterator[Finding]:
    """Every weights file is what its header says."""
    for header in subject.headers.values():
        yield from header.findings


def check_index(subject: Subject) -> Iterator[Finding]:
    """The index names every tensor where it is, once, and every file; without one there is one file."""
    path = subject.path / INDEX
    if not path.is_file():
        yield from _check_one_file(subject)
        return
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        yield error(f"{path}: has no weight_map, which names the file of each tensor")
        return
    broken = set()
    for file, count in sorted(Counter(map(str, weight_map.values())).items()):
        try:
            if not file_inside(subject.path, file, f"{path}: says that {count} tensors are in").is_file():
                yield error(f"{subject.path / file}: named in {INDEX}, but missing ({count} tensors)")
                broken.add(file)
        except UnsafeError as raised:
            yield unsafe(raised.findings[0])
            broken.add(file)
    broken |= {name for name, header in subject.headers.items() if header.findings}
    files = {name: str(file) for name, file in weight_map.items()}
    yield from _check_places(subject, path, files, broken)
    yield from _check_strangers(subject, set(files.values()))
    if not broken:
        yield from _check_size(subject, path, index)


def _check_one_file(subject: Subject) -> Iterator[Finding]:
    shards = [name for name in subject.headers if _MODEL_FILE.fullmatch(name)]
    if WEIGHTS not in shards:
        yield error(f"{subject.path}: neither {WEIGHTS} nor {INDEX}" + (f", which should name {shards[0]}" if shards else ""))
    elif len(shards) > 1:
        yield error(f"{subject.path / WEIGHTS}: beside {', '.join(set(shards) - {WEIGHTS})}, and no {INDEX} says what holds")


def _check_places(subject: Subject, path: Path, weight_map: dict[str, str], broken: set[str]) -> Iterator[Finding]:
    """Tensors that the index does not have where they are, `broken` being files that nothing can be said of."""
    places: dict[str, list[str]] = {}
    for file in sorted(set(weight_map.values()) & subject.headers.keys()):
        for name in subject.headers[file].tensors:
            places.setdefault(name, []).append(file)
    for name, files in places.items():
        if len(files) > 1:
            yield error(f"{path}: {name} is in {' and in '.join(files)} (a duplicate)")
        elif name not in weight_map:
            yield error(f"{path}: does not name {name}, which is in {files[0]}")
        elif weight_map[name] not in files:
            yield error(f"{path}: says that {name} is in {weight_map[name]}, but it is in {files[0]}")
    for name, file in weight_map.items():
        if name not in places and file not in broken:
            yield error(f"{subject.path}: '{name}' is in the index but in no shard")


def _check_strangers(subject: Subject, named: set[str]) -> Iterator[Finding]:
    """Weights that the index does not name."""
    for file in sorted(subject.headers.keys() - named):
        if not _MODEL_FILE.fullmatch(file):
            yield warning(f"{subject.path / file}: is not in {INDEX}")
        elif file == WEIGHTS:
            yield error(f"{subject.path / file}: is not in {INDEX}, and transformers would load it instead of what is")
        else:
            yield error(f"{subject.path / file}: is not in {INDEX}: of another model, or forgotten")


def _check_size(subject: Subject, path: Path, index: dict[str, Any]) -> Iterator[Finding]:
    about = index.get("metadata")
    says = about.get("total_size") if isinstance(about, dict) else None
    named = set(index["weight_map"].values())
    tensors = [stored for file in named for stored in subject.headers[file].tensors.values()]
    total = sum(stored.numel * stored.dtype.itemsize for stored in tensors)
    if says is not None and says != total:
        yield error(f"{path}: total_size is {json.dumps(says)}, the tensors have {total} bytes")


def check_pickles(subject: Subject) -> Iterator[Finding]:
    """A pickle that is more than values and tensors is unsafe, whether anything needs it or not. None is run."""
    for path in sorted(subject.path.rglob("*")):
        if not path.name.endswith(_PICKLES) or not path.is_file():
            continue
        if not zipfile.is_zipfile(path):
            if _is_pickle(path):
                yield unsafe(f"{path}: a bare pickle, which could run code when it is loaded (works: safetensors)")
            continue
        try:
            TorchFile(path)
        except UnsafeError as raised:
            yield unsafe(raised.findings[0])
            continue
        yield warning(f"{path}: a pickle, which nobody needs beside safetensors (h3scale checkpoint release leaves it out)")


def check_torch_files(subject: Subject) -> Iterator[Finding]:
    """Every file of a training checkpoint can be read, and is plain values."""
    for path in sorted(subject.path.rglob("*.pt")):
        try:
            TorchFile(path)
        except UnsafeError as raised:
            yield unsafe(raised.findings[0])


def check_remote_code(subject: Subject) -> Iterator[Finding]:
    """Nothing asks a loader to run code that comes with the model."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = subject.model / name
        if path.is_file() and "auto_map" in read_json(path):
            yield unsafe(f"{path}: auto_map asks loaders to run code (h3scale checkpoint release drops it)")
    for path in sorted(subject.model.glob("*.py")):
        yield unsafe(f"{path}: code beside a model, which a loader may run (h3scale checkpoint release leaves it out)")
    if (subject.model / ADAPTER_CONFIG).is_file() and (subject.model / "config.json").is_file():
        yield warning(f"{subject.model / ADAPTER_CONFIG}: transformers adds this adapter to the model when it loads the folder")


def _is_pickle(path: Path) -> bool:
    """Whether the file begins as a pickle does, of any protocol; `.bin` may be anything."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    try:
        return any(operation.name in _OPERATIONS for operation, _, _ in pickletools.genops(head))
    except ValueError:  # no pickle, or one that is longer
        return False
