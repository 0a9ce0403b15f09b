"""A package's directory: the files that mark it."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
LOCK = "lock"


def is_package(directory: Path) -> bool:
    """Whether a directory is a package's, also where its manifest is lost or not yet there: no checkpoint."""
    named = any((directory / name).is_file() for name in (MANIFEST, LOCK))
    return named and not (directory / "config.json").exists()
