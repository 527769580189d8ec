"""Parts: the files and hub sets behind what people name as sources, found and checked before anything is opened."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from h3scale.config.data import Source
from h3scale.data.adapters import ADAPTERS, Adapter, adapter_named
from h3scale.errors import ConfigError, MissingInputError

HUB = "hub:"
KINDS = {".jsonl.gz": "jsonl.gz", ".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Part:
    """One file or hub set. `stem` begins the ids of records that have none; no two parts of one reading share it."""

    path: str  # as named by people
    kind: str  # jsonl | jsonl.gz | parquet | csv | hub
    adapter: str | None = None
    alignment: str | None = None
    split: str = "train"
    part: str | None = None
    stem: str = ""

    def where(self, number: int) -> str:
        """The place of a line or row, for a finding."""
        return f"{self.path}:{number}" if self.kind.startswith("jsonl") else f"{self.path}:row {number}"


def parts_of(sources: Sequence[str | Path | Source]) -> list[Part]:
    """The files and hub sets behind some sources, in order; a folder gives its record files by name, hidden ones left out.

    Nothing is opened. Raises MissingInputError (66) for all files that are not there, ConfigError (78) for adapters that
    do not fit and for what is named twice.
    """
    missing: list[str] = []
    wrong: list[str] = []
    parts: list[Part] = []
    named: dict[tuple[object, ...], Part] = {}
    for source in sources:
        source = source if isinstance(source, Source) else Source(path=str(source))
        try:
            found = [_hub_part(source)] if source.path.startswith(HUB) else _file_parts(source)
        except MissingInputError as error:
            missing += error.findings
            continue
        except ConfigError as error:
            wrong += error.findings
            continue
        for part in found:
            first = named.setdefault(_identity(part), part)
            if first is not part:
                wrong.append(f"{part.path}: named twice" + (f", before as {first.path}" if first.path != part.path else ""))
        parts += found
    if missing:
        raise MissingInputError(missing + wrong)
    if wrong:
        raise ConfigError(wrong)
    return _with_stems(parts)


def hub_name(path: str) -> tuple[str, str | None]:
    """(owner/name, folder in it)."""
    owner, _, rest = path.removeprefix(HUB).partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name:
        raise ConfigError(f"{path}: expected {HUB}OWNER/NAME")
    return f"{owner}/{name}", folder or None


def _hub_part(source: Source) -> Part:
    name, _ = hub_name(source.path)
    adapter = _adapter(source, source.adapter or (name if name in ADAPTERS else None))
    split = source.split
    if adapter and adapter.name == name:
        split = split if "split" in source.model_fields_set else adapter.splits[0]
        if split not in adapter.splits:
            raise ConfigError(f"{source.path}: split: '{split}' is none of this set's (works: {', '.join(adapter.splits)})")
    return _part(source, source.path, "hub", adapter, split)


def _file_parts(source: Source) -> list[Part]:
    adapter = _adapter(source, source.adapter)
    if "split" in source.model_fields_set:
        raise ConfigError(f"{source.path}: split: only a hub data set has splits (works: the file of one split)")
    if not source.path:  # would be the current folder
        raise MissingInputError("'': no such file")
    path = Path(source.path)
    files = [path]
    if path.is_dir():
        try:
            known = [file for file in path.iterdir() if file.name.endswith(tuple(KINDS)) and not file.name.startswith(".")]
        except OSError as error:
            raise MissingInputError(f"{source.path}: cannot be read ({error.strerror})") from None
        files = sorted(known, key=lambda file: file.name)
        if not files:
            raise MissingInputError(f"{source.path}: a folder without record files (works: {', '.join(KINDS)})")
    missing = [f"{file}: {'not a regular file' if file.exists() else 'no such file'}" for file in files if not file.is_file()]
    if missing:
        raise MissingInputError(missing)
    return [_part(source, str(file), _kind(file.name), adapter) for file in files]


def _adapter(source: Source, name: str | None) -> Adapter | None:
    adapter = adapter_named(name, source.path) if name else None
    if adapter and not (source.alignment or adapter.alignment):
        raise ConfigError(f"{source.path}: alignment: adapter '{name}' has none of its own (works: alignment: NAME)")
    if adapter and adapter.cut and not source.part:
        raise ConfigError(f"{source.path}: part: adapter '{name}' needs a side of its cut (works: part: train, part: heldout)")
    if source.part and not (adapter and adapter.cut):
        cut = ", ".join(adapter.name for adapter in ADAPTERS.values() if adapter.cut)
        raise ConfigError(f"{source.path}: part: '{source.part}' needs an adapter with a cut (works: {cut})")
    return adapter


def _part(source: Source, path: str, kind: str, adapter: Adapter | None, split: str = "train") -> Part:
    alignment = source.alignment or (adapter.alignment if adapter else None)
    return Part(path, kind, adapter.name if adapter else None, alignment, split, source.part)


def _kind(name: str) -> str:
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "jsonl")


def _identity(part: Part) -> tuple[object, ...]:
    """Two names of one file are the same; the two sides of a cut, and two splits, are not."""
    if part.kind == "hub":
        return part.path, part.split, part.part
    stat = Path(part.path).stat()
    return stat.st_dev, stat.st_ino, part.part


def _with_stems(parts: list[Part]) -> list[Part]:
    """The file name without its ending, and as many folders before it as it takes to tell the parts from each other."""
    pieces = {(part.path, part.split): _pieces(part) for part in parts}
    stems: dict[tuple[str, str], str] = {}
    for depth in range(1, max(map(len, pieces.values()), default=0) + 1):
        names = {key: "/".join(piece[-depth:]) for key, piece in pieces.items()}
        counts = Counter(names.values())
        for key, name in names.items():
            if counts[name] == 1:
                stems.setdefault(key, name)
    return [replace(part, stem=stems.get((part.path, part.split), part.path)) for part in parts]


def _pieces(part: Part) -> tuple[str, ...]:
    if part.kind == "hub":
        return (*part.path.removeprefix(HUB).split("/")[:-1], f"{part.path.split('/')[-1]}-{part.split}")
    *folders, name = PurePath(part.path).parts
    ending = next((ending for ending in KINDS if name.endswith(ending)), PurePath(name).suffix)
    return (*folders, name.removesuffix(ending))
