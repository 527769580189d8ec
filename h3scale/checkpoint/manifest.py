"""The manifest of a training checkpoint, which makes a folder one: what is in it, and sizes and sha256 of all its files.

`format` is the version of this layout, `manifest_sha256` the hash of all the rest: a manifest that has changed since it was
written is as damaged as a file that has.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from h3scale.checkpoint.shards import read_json, write_json
from h3scale.errors import DataError
from h3scale.redact import without_secrets

MANIFEST = "manifest.json"
FORMAT = 1
_OWN = "manifest_sha256"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest by atomic rename, on disk when this returns. Keys and passwords are hidden. Raises OSError."""
    values = without_secrets({"format": FORMAT, **facts})
    write_json(folder / MANIFEST, values | {_OWN: _digest(values)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts that were given to `write_manifest`. DataError (65) for one that is torn, has changed or is of another format."""
    values = read_json(folder / MANIFEST)
    if values.pop(_OWN, None) != _digest(values):
        raise DataError(f"{folder / MANIFEST}: sha256 differs from its own: it has changed since it was written")
    written = values.pop("format", None)
    if written != FORMAT:
        raise DataError(f"{folder / MANIFEST}: is of format {written}, this version reads {FORMAT}")
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
