"""A training checkpoint: its files are those of its manifest, of all ranks of one run, and of nobody else."""

from collections.abc import Iterator

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.findings import Finding, Report, error
from h3scale.checkpoint.manifest import MANIFEST
from h3scale.checkpoint.receipt import sha256
from h3scale.checkpoint.shards import TOKENIZER_FILES
from h3scale.checkpoint.training_checkpoint import TrainingCheckpoint
from h3scale.model.experts import CONFIG_KEY


def check_manifest(checkpoint: TrainingCheckpoint, hashes: bool) -> Iterator[Finding]:
    """Every file that the manifest names has its size and sha256, and there is none that it does not name."""
    if checkpoint.manifest is None:
        return
    if hashes:
        yield from map(error, checkpoint.check_hashes())
    else:
        checkpoint.check_sizes()


def check_strangers(checkpoint: TrainingCheckpoint) -> Iterator[Finding]:
    """No file is there that was not saved with the others: a stale one of another run would be read as one of this."""
    if checkpoint.manifest is None:
        return
    listed = set(checkpoint.manifest.get("files", {})) | {MANIFEST}
    for path in sorted(checkpoint.path.rglob("*")):
        if path.is_file() and path.relative_to(checkpoint.path).as_posix() not in listed:
            yield error(f"{path}: is not in {MANIFEST}: of another run, or put there later")


def check_ranks(subject: Subject, report: Report) -> Iterator[Finding]:
    """The files of all ranks are there, of one run, stage and step, and hold every part of every tensor once."""
    report.kind = subject.weights.kind
    specs = subject.weights.specs
    report.num_tensors = len(specs)
    report.num_parameters = sum(spec.num_bytes // spec.dtype.itemsize for spec in specs.values())
    report.dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})
    yield from ()


def check_settings(subject: Subject, other: Subject) -> Iterator[Finding]:
    """The order of the experts and the tokenizer are those of the training."""
    ours, theirs = subject.config.get(CONFIG_KEY), other.config.get(CONFIG_KEY)
    if ours != theirs:
        yield error(f"{subject.model}/config.json: {CONFIG_KEY}: {ours}, the checkpoint was trained with {theirs}")
    for name in TOKENIZER_FILES:
        trained, here = other.model / name, subject.model / name
        if trained.is_file() and (not here.is_file() or sha256(here) != sha256(trained)):
            yield error(f"{here}: is not the file that the model was trained with ({trained})")
