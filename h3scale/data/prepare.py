"""From sources to a prepared store: read, check, render, tokenize and sign in parallel, then drop what does not belong.

Work is cut into blocks of lines. Each finished block is a file of its own, so a run that is killed goes on where it was;
the store appears by one rename at the end. Its name is a hash of everything that decides its content, so one folder
serves all runs with the same records and tokenizer, and changed records are another store.
"""

import errno
import fcntl
import gc
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from h3scale.config.data import Data
from h3scale.data import adapters
from h3scale.data.assemble import Chunks, assemble, decide, read_chunks
from h3scale.data.chunks import SMALL, Work, make_chunks
from h3scale.data.heldout import heldout_prompts
from h3scale.data.pages import sync
from h3scale.data.sources import MAX_BLOCK_BYTES, Block, Part, blocks, parts_of
from h3scale.data.store import FORMAT, Store, open_store
from h3scale.errors import ConfigError, DataError, MissingInputError, OutputError, PeerLostError, StorageError
from h3scale.log import logger, progress

BLOCK_LINES = 1_000  # a tenth of a second of work, half a megabyte on disk
FEW = 0.002  # an alignment with a smaller share of the records may be a misspelt one
MAX_SHOWN = 20  # findings printed before "and N more"


@contextmanager
def _unscanned() -> Iterator[None]:
    """What is there already is left out of garbage collection: a full one would visit all of PyTorch's objects each time."""
    if gc.get_freeze_count():  # by the caller
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_unscanned()
def prepare(data: Data, tokenizer: Any, root: str | Path) -> Store:
    """The prepared store of a recipe's records under `root`: made now, or found there.

    Raises what reading the sources raises; DataError (65) for bad records when `data.bad_records` is stop, or when they
    are more than `data.max_bad` of all; MissingInputError (66) for evaluation files that are not there; OutputError (73)
    where `root` cannot be written; StorageError (74) and PeerLostError (69) when it ends half-way: what is done is kept.
    """
    root = Path(root)
    parts = parts_of(data.records)
    missing = [f"data.hygiene.heldout: {path}: no such file" for path in data.hygiene.heldout if not Path(path).is_file()]
    if missing:
        raise MissingInputError(missing)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{root}: cannot be made ({error.strerror}; data.prepared names another folder)") from None
    identity = _identity(data, tokenizer, parts, root)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    manifest = root / key / "manifest.json"
    try:
        if not manifest.is_file():  # a finished store needs no lock: it may be on a file system one can only read
            with _alone(root / f".lock-{key}"):
                if not manifest.is_file():
                    _say_what_changed(root, parts, identity)
                    _prepare(data, tokenizer, parts, identity, root / key)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputError(f"{root}: cannot be written ({error.strerror}; data.prepared names another folder)") from None
        raise StorageError(f"{root / key}: {error.strerror or error} (what is done is kept; run it again)") from None
    except BrokenProcessPool:
        raise PeerLostError(
            f"{root / key}: a process that prepares was killed, for want of memory perhaps (what is done is kept; "
            "works: run it again, with fewer data.workers)"
        ) from None
    store = open_store(root / key)
    check_bad(store, data)
    return store


def check_bad(store: Store, data: Data) -> None:
    """Raises DataError (65) when the recipe does not accept as many bad records as the store's sources had."""
    bad, checked = store.manifest["dropped"].get("bad", 0), store.manifest["checked"]
    share = bad / max(checked, 1)
    if not bad or (data.bad_records == "drop" and share <= data.max_bad):
        return
    limit = "data.bad_records is stop" if data.bad_records == "stop" else f"data.max_bad is {data.max_bad:.2%}"
    with (store.folder / "dropped.jsonl").open(encoding="utf-8") as file:
        items = [item for item in map(json.loads, file) if item["why"] == "bad"]
    shown = [f"{item['where']}: {item['what']}" for item in items[:MAX_SHOWN]]
    more = [f"and {bad - MAX_SHOWN} more, in {store.folder / 'dropped.jsonl'}"] if bad > MAX_SHOWN else []
    raise DataError([*shown, *more, f"{bad:,} of {checked:,} records are bad ({share:.2%}), and {limit}"])


def prepared_folder(data: Data, out: str) -> Path:
    """Where a recipe's stores are: `data.prepared`, or `prepared` beside the recipe's output."""
    return Path(data.prepared) if data.prepared else Path(out).parent / "prepared"


def relevant_alignments(store: Store, data: Data, wanted: str | None, known: Sequence[str] | None) -> list[str]:
    """The label order of a run: the one alignment it is for, the model's (`known`), the recipe's, or the records' own.

    DataError (65) for an alignment without records, and for records of an alignment that the model does not know.
    """
    names = ", ".join(sorted({source["path"] for source in store.manifest["sources"]}))
    records = {name: store.manifest["counts"][name]["records"] for name in store.alignments}
    present = [name for name, count in records.items() if count]
    asked = [wanted] if wanted else list(known or data.alignments or present)
    findings = [
        f"{names}: alignment '{name}' has no records (found: {', '.join(present)})" for name in asked if name not in present
    ]
    if known and not wanted:
        findings += [
            f"{names}: alignment '{name}' is none of the model's ({', '.join(known)})" for name in present if name not in known
        ]
    if findings:
        raise DataError(findings)
    for name in asked if not data.alignments else ():
        if records[name] < FEW * sum(records.values()):
            logger.warning(
                "%s: only %d records are '%s': misspelt? (data.alignments says which are meant)", names, records[name], name
            )
    return asked


def _identity(data: Data, tokenizer: Any, parts: list[Part], root: Path) -> dict[str, Any]:
    """Everything that decides the content of the store."""
    sources, heldout = _files(data, parts, root)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # encode leaves them out
    rules |= {
        "template": tokenizer.chat_template,
        "names": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    return {
        "format": [FORMAT, adapters.VERSION, BLOCK_LINES, MAX_BLOCK_BYTES],
        "alignments": data.alignments,
        "sources": sources,
        "tokenizer": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        "hygiene": data.hygiene.model_dump() | {"heldout": heldout},
    }


def _files(data: Data, parts: list[Part], root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What is read, and from what: of the sources and of the evaluation files."""
    hashes = _Hashes(root / "hashes.json")
    sources = [
        {
            "path": part.path,
            "sha256": hashes.of(part.path) if part.kind != "hub" else None,
            "read_as": [part.kind, part.adapter, part.alignment, part.split, part.part],
        }
        for part in parts
    ]
    heldout = [hashes.of(path) for path in data.hygiene.heldout]
    hashes.save()
    return sources, heldout


def _prepare(data: Data, tokenizer: Any, parts: list[Part], identity: dict[str, Any], folder: Path) -> None:
    work = folder.with_name(f".work-{folder.name}")
    (work / "chunks").mkdir(parents=True, exist_ok=True)
    heldout = [prompt for path in data.hygiene.heldout for prompt in heldout_prompts(path)]
    sign = data.hygiene.near_duplicates is not None
    task = Work(tokenizer, data.alignments, sign, heldout, data.hygiene.heldout_similarity)
    paths = _make_chunks(parts, task, data.workers, work / "chunks")
    if _files(data, parts, folder.parent) != (identity["sources"], identity["hygiene"]["heldout"]):
        shutil.rmtree(work)
        raise DataError(f"{', '.join(part.path for part in parts)}: changed while being read (works: run it again)")
    chunks = read_chunks(paths, parts)
    keep_N, dropped = decide(chunks, data.hygiene, heldout, work / "signatures.npy")
    if not keep_N.any():
        raise DataError(_why_nothing_is_left(parts, chunks, dropped))
    made = work / "store"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    counts, content = assemble(chunks, keep_N, len(tokenizer), made)
    with (made / "dropped.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in dropped)
    causes = dict(Counter(item["why"] for item in dropped))
    manifest = {
        "format": FORMAT,
        "key": folder.name,
        "identity": identity,
        "content": content,
        "sources": [
            {"path": part.path, "kind": part.kind, "part": part.part, "lines": lines, "filtered": filtered}
            for part, lines, filtered in zip(parts, chunks.lines, chunks.filtered, strict=True)
        ],
        "alignments": chunks.alignments,
        "counts": counts,
        "checked": chunks.checked,
        "dropped": causes,
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }
    (made / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(made)
    shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is no store
    made.rename(folder)
    shutil.rmtree(work)
    if causes:
        said = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in sorted(causes.items()))
        logger.info("left out: %s (%s says which and why)", said, folder / "dropped.jsonl")


def _why_nothing_is_left(parts: list[Part], chunks: Chunks, dropped: list[dict[str, Any]]) -> list[str]:
    names = ", ".join(part.path for part in parts)
    shown = [f"{item['where']}: {item['what']}" for item in dropped if item["why"] == "bad"][:MAX_SHOWN]
    causes = Counter(item["why"].replace("_", " ") for item in dropped)
    causes["left out by the adapter"] = sum(chunks.filtered)
    counts = ", ".join(f"{count:,} {why}" for why, count in causes.items() if count)
    return [*shown, f"{names}: no usable records ({counts})"]


def _make_chunks(parts: list[Part], task: Work, workers: int | None, folder: Path) -> list[Path]:
    """All chunks, those made before an interruption included, in the order of the sources."""
    paths: list[Path] = []
    total = sum(Path(part.path).stat().st_size for part in parts if part.kind != "hub")

    def jobs() -> Iterator[tuple[int, int, Block, Path]]:
        for source, part in enumerate(parts):
            for block in blocks(part, BLOCK_LINES):
                path = folder / f"{len(paths):08d}.npz"
                paths.append(path)
                if path.exists():
                    bar.advance(_size(block))
                else:
                    yield len(paths) - 1, source, block, path

    if workers is None:
        few = total < SMALL * 500 and all(part.kind in ("jsonl", "csv") for part in parts)
        workers = 1 if few else len(os.sched_getaffinity(0))
    if workers > 1 and getattr(current_process(), "_inheriting", False):  # a worker that runs the caller's script again
        raise ConfigError("prepare starts processes, which run this script again: call it under if __name__ == '__main__'")
    records = tokens = 0
    with progress("prepare", total, "bytes") as bar:
        for block, (_, num_records, num_tokens) in make_chunks(jobs(), task, workers):
            records, tokens = records + num_records, tokens + num_tokens
            bar.total = max(bar.total, bar.done + _size(block))  # packed files and hub sets hold more than their size says
            bar.advance(_size(block), f"{records:,} records, {tokens:,} tokens")
    return paths


def _size(block: Block) -> int:
    return sum(len(line) if isinstance(line, bytes) else len(str(line)) for line in block.lines)


def _say_what_changed(root: Path, parts: list[Part], identity: dict[str, Any]) -> None:
    """One line for every source or tokenizer that a store of the same files was made from in another state."""
    paths = [part.path for part in parts]
    for path in sorted(root.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if [source["path"] for source in before["sources"]] != paths:
                continue
        except (ValueError, KeyError):  # damaged: what opens it says so
            continue
        pairs = zip(paths, before["identity"]["sources"], identity["sources"], strict=True)
        changed = [name for name, old, new in pairs if old != new]
        changed += [name for name in identity if name != "sources" and before["identity"].get(name) != identity[name]]
        logger.info("%s changed since %s was prepared (which stays): preparing anew", ", ".join(changed), path.parent)
        return


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process prepares the same store; the others wait. The lock goes with its process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares the same records")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            logger.warning("%s: this file system has no locks: do not prepare the same records twice at once", path.parent)
        yield


class _Hashes:
    """sha256 of files, remembered by path, size and time of change, so that large files are read for it once."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}
        if not isinstance(self.known, dict):
            self.known = {}

    def of(self, path: str) -> str:
        try:
            return self._of(path)
        except OSError as error:
            raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from None

    def _of(self, path: str) -> str:
        stat = Path(path).stat()
        name, state = str(Path(path).resolve()), [stat.st_size, stat.st_mtime_ns]
        before = self.known.get(name)
        if not isinstance(before, list) or before[0] != state:
            with Path(path).open("rb") as file:
                self.known[name] = [state, hashlib.file_digest(file, "sha256").hexdigest()]
        return self.known[name][1]

    def save(self) -> None:
        partial = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex}")
        with suppress(OSError):  # where it cannot be written, files are read again next time
            partial.write_text(json.dumps(self.known), encoding="utf-8")
            partial.replace(self.path)
