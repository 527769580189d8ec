"""Is a model what it says, and is it the model that was trained? Everything wrong is found in one go."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

from h3scale.checkpoint import h3fusion
from h3scale.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from h3scale.checkpoint.checks import adapter, compare, files, sums, templates, tensors, tokenizer, training
from h3scale.checkpoint.checks.logits import check_logits, check_probe
from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.extents import Weights
from h3scale.checkpoint.findings import Finding, Report, Severity, error
from h3scale.checkpoint.h3fusion import open_h3fusion
from h3scale.checkpoint.headers import read_header
from h3scale.checkpoint.inside import is_plain, leads_outside
from h3scale.checkpoint.lora import open_weights
from h3scale.checkpoint.manifest import MANIFEST
from h3scale.checkpoint.receipt import check_receipt
from h3scale.checkpoint.shard_files import INDEX, WEIGHTS
from h3scale.checkpoint.shards import ModelFolder, read_json
from h3scale.checkpoint.tag_folder import UNIVERSAL
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint, find_checkpoint, latest_tag
from h3scale.errors import DataError

_Check = Callable[[], Iterable[Finding]]


def verify(
    model: str | Path,
    against: str | Path | None = None,
    *,
    logits: bool = False,
    hashes: bool = True,
    config_from: str | Path | None = None,
) -> Report:
    """`examine`, and UnsafeError (77) or DataError (65) with all findings when there is more than warnings."""
    report = examine(model, against, logits=logits, hashes=hashes, config_from=config_from)
    report.raise_errors()
    return report


def examine(
    model: str | Path,
    against: str | Path | None = None,
    *,
    logits: bool = False,
    hashes: bool = True,
    config_from: str | Path | None = None,
) -> Report:
    """All that is wrong with a model folder of any layout, an adapter, a training checkpoint, a moe.pt, or a receipt.

    `against`, another of them: every tensor, in the coarser number format of both; with `logits` also what both compute. A
    training checkpoint brings its own hashes (unless `hashes` is off: they read all of it) and its probe, on which the logits
    are compared in any case. `config_from`: config and tokenizer of a folder that has none, such as a bare DeepSpeed folder.
    Raises MissingInputError (66) when a folder is not there.
    """
    path = Path(model)
    if path.is_file() and not _is_torch_file(path):
        report = Report(str(model), "receipt")
        report.run("receipt", partial(_check_receipt, path, report))
        return report
    try:
        subject = open_subject(path, config_from)
    except DataError as broken:  # a manifest that has changed, say
        return Report(str(model), "unreadable", findings=[Finding(Severity.error, line, "kind") for line in broken.findings])
    report = Report(str(model), _kind(subject))
    other = open_subject(Path(against), config_from) if against is not None else None
    for name, check in _checks(subject, report, hashes):
        report.run(name, check)
    if other is not None:
        _examine_against(subject, other, report, logits, hashes)
    return report


def open_subject(path: Path, config_from: str | Path | None = None) -> Subject:
    """What is to be verified; nothing is read yet but what says of what kind it is."""
    if path.is_file():
        model = open_h3fusion(path, config_from)
        subject = Subject(path, model.folder, lambda: model.weights)
        subject.config = model.config  # of a mixture: the folder has that of the base
        return subject
    if path.is_dir() and not (path / "config.json").is_file():
        path = latest_tag(path)
    if path.is_dir() and not _is_training(path):
        is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
        home = path if is_adapter or (path / "config.json").is_file() else Path(config_from or path)
        if not is_adapter:
            ModelFolder(path, home)  # says what is missing in a folder that is neither
        return Subject(path, home, partial(_stored_in, path, is_adapter), has_config=not is_adapter)
    is_bare = path.is_dir() and _is_bare(path)
    if is_bare and config_from is None:
        checkpoint = TrainingCheckpoint(path, path, path, None)
    else:
        checkpoint = find_checkpoint(path, config_from if is_bare else None)
    reader = partial(open_weights, checkpoint.deepspeed, checkpoint.model)
    has_config = (checkpoint.model / "config.json").is_file()
    return Subject(checkpoint.path, checkpoint.model, reader, checkpoint, has_config)


def _is_torch_file(path: Path) -> bool:
    return path.suffix == ".pt" or is_zipfile(path)


def _kind(subject: Subject) -> str:
    if subject.path.is_file():
        return h3fusion.KIND
    if subject.checkpoint is not None:
        return "training checkpoint"  # check_ranks says of which kind
    return "model folder" if subject.has_config else "adapter"


def _is_training(path: Path) -> bool:
    is_step_or_run = (path / MANIFEST).is_file() or any(path.glob(f"step-*/{MANIFEST}"))
    return is_step_or_run or (_is_bare(path) and not any((path / name).is_file() for name in (WEIGHTS, INDEX)))


def _is_bare(path: Path) -> bool:
    """Whether this is a folder of DeepSpeed's."""
    return not (path / MANIFEST).is_file() and ((path / UNIVERSAL).is_dir() or any(path.glob("*_states.pt")))


def _stored_in(path: Path, is_adapter: bool) -> Weights:
    """The tensors of the files that count, as far as they can be read."""
    headers = {name: read_header(path / name) for name in _weights_files(path, is_adapter)}
    entries = {name: stored for header in headers.values() for name, stored in header.tensors.items()}
    return Weights(path, "", world_size=1, ep_size=1, is_rounded=False, entries=entries)


def _weights_files(path: Path, is_adapter: bool) -> list[str]:
    """Those that the index names, or the one there is; check_index says what is wrong with it."""
    if is_adapter or not (path / INDEX).is_file():
        named = {ADAPTER_WEIGHTS if is_adapter else WEIGHTS}
    else:
        weight_map = read_json(path / INDEX).get("weight_map")
        named = {name for name in weight_map.values() if is_plain(name)} if isinstance(weight_map, dict) else set()
    return [name for name in sorted(named) if (path / name).is_file() and not leads_outside(path, path / name)]


def _checks(subject: Subject, report: Report, hashes: bool) -> Iterator[tuple[str, _Check]]:
    """Every check that has something to look at, by its name."""
    if subject.path.is_file():
        yield "names", partial(tensors.check_names, subject, report)
        yield "values", partial(tensors.check_values, subject)
        return
    if subject.checkpoint is not None:
        yield "manifest", partial(training.check_manifest, subject.checkpoint, hashes)
        yield "strangers", partial(training.check_strangers, subject.checkpoint)
        yield "pickles", partial(files.check_torch_files, subject)
        yield "ranks", partial(training.check_ranks, subject, report)
        yield "checksums", partial(sums.check_the_receipt, subject, report)
    else:
        yield "headers", partial(files.check_headers, subject)
        yield "pickles", partial(files.check_pickles, subject)
        yield "checksums", partial(sums.check_sums, subject, report)
        yield "checksums", partial(sums.check_the_receipt, subject, report)
        yield "checksums", partial(sums.check_blobs, subject)
    yield "links", partial(files.check_links, subject)
    yield "names", partial(tensors.check_names, subject, report)
    yield "values", partial(tensors.check_values, subject)
    if subject.has_config:
        yield from _config_checks(subject)
    elif subject.checkpoint is None:
        yield "adapter", partial(adapter.check_adapter, subject)


def _config_checks(subject: Subject) -> Iterator[tuple[str, _Check]]:
    if subject.checkpoint is None:
        yield "index", partial(files.check_index, subject)
        yield "dtype", partial(tensors.check_dtype, subject)  # in a checkpoint it is that of training, beside fp32 masters
    yield "remote-code", partial(files.check_remote_code, subject)
    yield "token-ids", partial(tokenizer.check_special_ids, subject)
    yield "tokenizer", partial(tokenizer.check_tokenizer, subject)
    yield "chat-template", partial(templates.check_chat_templates, subject)


def _examine_against(subject: Subject, other: Subject, report: Report, logits: bool, hashes: bool) -> None:
    is_sound = not report.errors  # else what the models compute is not asked: it would fail, or say the same again
    if other.checkpoint is not None:
        report.run("against", partial(training.check_manifest, other.checkpoint, hashes))
        report.run("against", partial(training.check_settings, subject, other))
    report.run("against", partial(compare.check_against, subject, other, report))
    if is_sound and other.checkpoint is not None and not (logits and other.checkpoint.probe is None):
        report.run("logits", partial(check_probe, subject, other, report))
    elif is_sound and logits:
        report.run("logits", partial(check_logits, subject, other, report))


def _check_receipt(path: Path, report: Report) -> Iterator[Finding]:
    report.num_proven_tensors, findings = check_receipt(path)
    yield from map(error, findings)
