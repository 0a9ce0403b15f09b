"""What can be wrong with a build or with what was built. Each message ends with what to do."""

from __future__ import annotations

from pathlib import Path

from ...errors import AvlEdgeError, BadInput, BadModel


def rebuild(out: Path) -> str:
    """The way out of most of it."""
    return f"rebuild it with avl-edge build MODEL --out {out}"


class BadRecipe(BadInput):
    """A recipe that cannot be read or that contradicts itself."""


class BadPackage(BadModel):
    """A directory that holds no package, or one that is incomplete, damaged, tampered with or open to other users."""


class Mismatch(BadPackage):
    """A sound package that was built from something else, or for another machine; ``field`` says what differs."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class BuildRunning(AvlEdgeError):
    """Another process is building in the same directory."""

    http_status = 503


class BuildFailed(AvlEdgeError):
    """The files could not be written; what was there before is untouched."""
