"""Checksums, where there are any: SHA256SUMS, a receipt, the names of the files in the hub's cache."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from h3scale.checkpoint.checks.subject import Subject
from h3scale.checkpoint.consolidate import SUMS
from h3scale.checkpoint.findings import Finding, Report, error, unsafe, warning
from h3scale.checkpoint.inside import leads_outside
from h3scale.checkpoint.receipt import RECEIPT, check_receipt, sha256
from h3scale.checkpoint.shards import read_json

_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")  # in the hub's cache large files are called by their sha256


def check_sums(subject: Subject, report: Report) -> Iterator[Finding]:
    """Every file of SHA256SUMS is what it was."""
    path = subject.path / SUMS
    if not path.is_file():
        return
    listed = set()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        found = _SUM.fullmatch(line)
        if found is None:
            yield error(f"{path}:{number}: not a line of sha256sum: '{line[:80]}'")
            continue
        digest, name = found.groups()
        file = subject.path / name
        listed.add(name)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or leads_outside(subject.path, file):
            yield unsafe(f"{path}:{number}: names '{name}', outside the folder")
        elif not file.is_file():
            yield error(f"{file}: in {SUMS}, but missing")
        elif sha256(file) != digest:
            yield error(f"{file}: sha256 differs from {SUMS}: the file has changed since it was written")
    report.num_sums = len(listed)
    yield from _unknown(subject, listed, SUMS)


def check_the_receipt(subject: Subject, report: Report) -> Iterator[Finding]:
    """Every tensor and file is what it was when it was written."""
    path = subject.path / RECEIPT
    if not path.is_file():
        return
    report.num_proven_tensors, findings = check_receipt(path, subject.path)
    yield from map(error, findings)
    yield from _unknown(subject, set(read_json(path)["files"]), RECEIPT)


def check_blobs(subject: Subject) -> Iterator[Finding]:
    """Files of the hub's cache have the sha256 that they are called by."""
    for path in sorted(subject.path.iterdir()):
        blob = path.resolve()
        if path.is_symlink() and _BLOB.fullmatch(blob.name) and blob.is_file() and sha256(blob) != blob.name:
            yield error(f"{path}: sha256 differs from its name in the hub's cache ({blob.name[:12]}...): load it again")


def _unknown(subject: Subject, listed: set[str], where: str) -> Iterator[Finding]:
    present = {p.relative_to(subject.path).as_posix() for p in subject.path.rglob("*") if p.is_file()} - {SUMS, RECEIPT}
    for name in sorted(present - listed):
        yield warning(f"{subject.path / name}: is not in {where}")
