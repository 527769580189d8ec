"""Where the tensors of a Hugging Face model folder lie in its files, so that rows can be read without the rest."""

import json

from h3scale.checkpoint.extents import Extent, Stored
from h3scale.checkpoint.shard_files import header_of
from h3scale.checkpoint.shards import ModelFolder


def stored_tensors(folder: ModelFolder) -> dict[str, Stored]:
    """Every tensor of the folder by name. Raises what reading its specs raises."""
    stored = {}
    headers = {}
    for name, spec in folder.specs.items():
        path = folder.path / folder.files[name]
        if path not in headers:
            header = header_of(path)
            headers[path] = len(header), json.loads(header[8:])
        before, entries = headers[path]
        start, stop = entries[name]["data_offsets"]
        stored[name] = Stored(spec.shape, spec.dtype, (Extent(path, before + start, stop - start),))
    return stored
