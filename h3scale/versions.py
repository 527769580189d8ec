"""What code this is: what must be the same on all nodes of a run, and when a run goes on. No torch here."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from h3scale import __version__

PACKAGES = ("torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Of Python and all that decides on the bits; h3scale's with a digest of its source, which may be a clone's."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    own = f"{__version__} (source {digest.hexdigest()[:8]})"
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "h3scale": own}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
