"""Keys and passwords are hidden in all that h3scale writes: manifests, recipes, logs, reports, cards. No torch here.

A key is told by its shape, or because an environment variable whose name says so has the same value.
"""

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
MIN_CHARS = 8  # of an environment variable's value: TOKEN=1 must not hide every 1
_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)S?(_|$)", re.IGNORECASE)
_SHAPE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@host
    r"|(?<=\bBearer )[\w.~+/-]{8,}=*"
)


def without_secrets(value: Any) -> Any:
    """The same string, list or dictionary with *** where a key or a password was; anything else as it is."""
    if isinstance(value, str):
        for secret in _from_environment():
            value = value.replace(secret, HIDDEN)
        return _SHAPE.sub(HIDDEN, value)
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    return value


def _from_environment() -> list[str]:
    """The longest first: one may be the beginning of another."""
    found = (value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= MIN_CHARS)
    return sorted((value for value in found if not Path(value).is_absolute()), key=len, reverse=True)  # a path to a key is none
