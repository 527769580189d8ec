"""What verify has found: a list, each with how bad it is and which check says so."""

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from h3scale.errors import DataError, H3Error, UnsafeError

_LISTED = 50  # findings of one check and severity that are written out; the rest is counted


class Severity(enum.StrEnum):
    """`warning`: may be meant. `error`: wrong (65). `unsafe`: could run code, hang, or reach out of the folder (77)."""

    warning = "warning"
    error = "error"
    unsafe = "unsafe"


@dataclass(frozen=True)
class Finding:
    """One line for a person: where, what, what would work. `check` names the check, for scripts."""

    severity: Severity
    text: str
    check: str = ""


def warning(text: str) -> Finding:
    return Finding(Severity.warning, text)


def error(text: str) -> Finding:
    return Finding(Severity.error, text)


def unsafe(text: str) -> Finding:
    return Finding(Severity.unsafe, text)


@dataclass
class Report:
    """What was looked at, and what was found. `None`: was not there to be checked, or not asked for.

    `max_abs_difference` and `logit_limit` are of the logits; `compared_as` is the number format in which the tensors of two
    models were compared, `num_equal_tensors` how many of them are equal bit for bit in it.
    """

    model: str
    kind: str = "model folder"
    num_tensors: int = 0
    num_parameters: int = 0
    dtypes: list[str] = field(default_factory=list)
    num_sums: int | None = None
    num_proven_tensors: int | None = None
    num_equal_tensors: int | None = None
    compared_as: str | None = None
    max_abs_difference: float | None = None
    logit_limit: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 with nothing but warnings, 65 with errors, 77 with anything unsafe."""
        found = {finding.severity for finding in self.findings}
        return UnsafeError.exit_code if Severity.unsafe in found else DataError.exit_code if Severity.error in found else 0

    @property
    def errors(self) -> list[str]:
        """All that is not a warning, the unsafe first."""
        return self._texts(Severity.unsafe) + self._texts(Severity.error)

    @property
    def warnings(self) -> list[str]:
        return self._texts(Severity.warning)

    def run(self, name: str, check: Callable[[], Iterable[Finding]]) -> None:
        """Adds what a check finds. Errors for people that it raises are findings too, so that the other checks still run."""
        known = {finding.text for finding in self.findings}
        found = dict.fromkeys(finding for finding in _guarded(check) if finding.text not in known)
        for severity, of_it in groupby(sorted(found, key=lambda finding: finding.severity), lambda finding: finding.severity):
            listed = [Finding(severity, finding.text, name) for finding in of_it]
            self.findings += listed[:_LISTED]
            if len(listed) > _LISTED:
                self.findings.append(Finding(severity, f"{self.model}: ... and {len(listed) - _LISTED} more like this", name))

    def raise_errors(self, but_for: Iterable[str] = ()) -> None:
        """UnsafeError (77) or DataError (65) with all findings that are no warnings; `but_for` are checks that do not count."""
        kept = Report(self.model, findings=[finding for finding in self.findings if finding.check not in but_for])
        if kept.exit_code:
            raise (UnsafeError if kept.exit_code == UnsafeError.exit_code else DataError)(kept.errors)

    def to_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        return {**asdict(self), "exit_code": self.exit_code}

    def _texts(self, severity: Severity) -> list[str]:
        return [finding.text for finding in self.findings if finding.severity == severity]


def _guarded(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except UnsafeError as raised:
        yield from map(unsafe, raised.findings)
    except H3Error as raised:
        yield from map(error, raised.findings)
