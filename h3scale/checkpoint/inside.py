"""Names in files that came from somewhere else: they may name what lies beside them, and nothing further away."""

import re
from pathlib import Path

from h3scale.errors import UnsafeError

_NOT_PLAIN = re.compile(r"[\x00-\x1f/\\]|^\.{0,2}$")


def is_plain(name: object) -> bool:
    """Whether this is the name of a file and no path: no slash of either kind, no control character, no dots alone."""
    return isinstance(name, str) and not _NOT_PLAIN.search(name)


def file_inside(folder: Path, name: object, where: str) -> Path:
    """The path of a plain name in a folder; UnsafeError (77) for any other, and for a link that leads out of the folder."""
    if not is_plain(name):
        raise UnsafeError(f"{where} {name!r}, outside the folder (works: the plain name of a file in it)")
    return path_inside(folder, name, where)


def path_inside(folder: Path, name: object, where: str) -> Path:
    """The same of a path of plain names, such as `zero/NAME/fp32.pt`."""
    if not isinstance(name, str) or not all(map(is_plain, name.split("/"))):
        raise UnsafeError(f"{where} {name!r}, outside the folder (works: a path of plain names below it)")
    path = folder / name
    if leads_outside(folder, path):
        raise UnsafeError(f"{where} {name!r}, a link that leads outside the folder, to {path.resolve()} (works: the file itself)")
    return path


def leads_outside(folder: Path, path: Path) -> bool:
    """Whether a path below `folder` ends elsewhere when its links are followed.

    A snapshot in the hub's cache is a folder of links to `blobs` beside `snapshots`: these are its own.
    """
    home, end = folder.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and end.parent == home.parent.parent / "blobs"
    return not end.is_relative_to(home) and not in_cache
