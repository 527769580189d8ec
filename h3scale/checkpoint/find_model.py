"""Any model that can be read, by what lies at a path: a folder, a training checkpoint, an adapter, an official moe.pt."""

from pathlib import Path

from h3scale.checkpoint.adapter import ADAPTER_CONFIG, adapt
from h3scale.checkpoint.h3fusion import open_h3fusion
from h3scale.checkpoint.shards import read_json
from h3scale.checkpoint.source_model import SourceModel, open_model
from h3scale.errors import MissingInputError, UsageError


def find_model(path: str | Path, config_from: str | Path | None = None, base: str | Path | None = None) -> SourceModel:
    """The model at a path. `base`: what an adapter changes; by default the folder that it names.

    Raises what `open_model` does, UsageError (2) for a base without an adapter.
    """
    path = Path(path)
    if is_adapter(path):
        return adapt(open_model(base or _named_base(path), config_from), path)
    if base is not None:
        raise UsageError(f"--base: {base}, but {path} has no {ADAPTER_CONFIG}, so this is no adapter (works: without --base)")
    return open_h3fusion(path, config_from) if path.is_file() else open_model(path, config_from)


def is_adapter(path: Path) -> bool:
    """Whether a PEFT adapter lies there."""
    return (path / ADAPTER_CONFIG).is_file()


def _named_base(path: Path) -> str:
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    if not named or not Path(named).is_dir():
        raise MissingInputError(f"{path}: an adapter of '{named}', which is no folder here (works: --base FOLDER)")
    return str(named)
