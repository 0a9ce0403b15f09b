"""A package's directory: the files that mark it, and what publishing one needs."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import BadModel

MANIFEST = "manifest.json"
LOCK = "lock"


def is_package(directory: Path) -> bool:
    """Whether a directory is a package's, also where its manifest is lost or not yet there: no checkpoint.

    :class:`BadModel` for one that this user may not look into.
    """
    try:
        named = any((directory / name).is_file() for name in (MANIFEST, LOCK))
        return named and not (directory / "config.json").exists()
    except PermissionError:
        raise BadModel(f"{directory} may not be read by this user: chmod -R a+rX it, or run as its owner") from None


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk: what comes later must not be there before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
