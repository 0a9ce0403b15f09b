"""``manifest.json``: what a package is and which bytes it consists of. Written last, in one step: it is the package."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import BadPackage, rebuild
from .fingerprint import Fingerprint, Platform, file_digest

FORMAT = 3
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Of the files and their directory: no separator, no way up."""


@dataclass(frozen=True)
class File:
    """One file of a package: its size, and the SHA-256 of its content."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        """The file at ``path`` as it is now."""
        return cls(path.stat().st_size, file_digest(path))


@dataclass(frozen=True)
class Manifest:
    """``directory`` is where the files lie, beside the manifest; ``version`` is that of the program that built them."""

    version: str
    directory: str
    fingerprint: Fingerprint
    files: dict[str, File]

    def dumps(self) -> str:
        """The text of its file, with a digest of the rest at its end."""
        content = {"format": FORMAT, **asdict(self)}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps({**content, "digest": digest}, indent=2) + "\n"


def loads(text: str, path: Path) -> Manifest:
    """The manifest in ``text``; :class:`BadPackage`, naming ``path``, for one that is cut off, changed or foreign."""
    cure = rebuild(path.parent)
    try:
        content = dict(json.loads(text))
    except (ValueError, RecursionError, TypeError):
        raise BadPackage(f"{path} is cut off or damaged: {cure}") from None
    if content.get("format") != FORMAT:
        raise BadPackage(f"{path} is of format {content.get('format')!r}, this program reads {FORMAT}: {cure}")
    try:
        manifest = _manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadPackage(f"{path} does not describe a package: {cure}") from None
    if manifest.dumps() != text:
        raise BadPackage(f"{path} was changed after it was built: {cure}")
    return manifest


def _manifest(content: dict[str, Any]) -> Manifest:
    fingerprint = dict(content["fingerprint"])
    platform = fingerprint.pop("platform")
    files = {name: File(**entry) for name, entry in content["files"].items()}
    if not all(_NAME.fullmatch(name) for name in (*files, content["directory"])):
        raise ValueError("a name that may lead out of the package")
    return Manifest(
        content["version"],
        content["directory"],
        Fingerprint(**fingerprint, platform=None if platform is None else Platform(**platform)),
        files,
    )
