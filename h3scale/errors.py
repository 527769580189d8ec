"""The errors h3scale shows to people, and the exit code of each (sysexits, so that scripts can know them)."""

from collections.abc import Iterable


class H3Error(Exception):
    """An error for a person: one line a finding (where, what value, what would work), no traceback.

    All findings of one check are collected and raised together.
    """

    exit_code = 70

    def __init__(self, findings: str | Iterable[str]):
        self.findings = [findings] if isinstance(findings, str) else list(findings)
        super().__init__("\n".join(self.findings))


class UsageError(H3Error):
    """The command line itself is wrong."""

    exit_code = 2


class DataError(H3Error):
    """Records, a model folder or a checkpoint that are there but not as they must be."""

    exit_code = 65


class MissingInputError(H3Error):
    """A file or folder that was named is not there."""

    exit_code = 66


class PeerLostError(H3Error):
    """Another rank died or a collective timed out."""

    exit_code = 69


class OutputError(H3Error):
    """The output cannot be created: it exists already, or the place is not writable."""

    exit_code = 73


class TakenError(OutputError):
    """Another run is writing the output."""


class StorageError(H3Error):
    """Reading or writing failed underneath (disk full, I/O error)."""

    exit_code = 74


class StoppedError(H3Error):
    """A run was asked to end before its last step; it is saved, and the same command goes on there."""

    exit_code = 75


class DivergedError(H3Error):
    """The losses or gradients of too many steps in a row were not finite."""

    exit_code = 76


class UnsafeError(H3Error):
    """Refused for safety: a pickle, remote code, a path that leaves its folder."""

    exit_code = 77


class ConfigError(H3Error):
    """A recipe, an override or a DeepSpeed file with a wrong value."""

    exit_code = 78
