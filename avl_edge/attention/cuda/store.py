"""Compiled kernels on disk: only whole ones, only one's own.

An entry is a file named by the digest of what it was made from; it begins with the SHA-256 of the rest, so that one
that was cut off or changed is not taken for whole. The cache saves a second per start; it is never needed: where the
folder cannot be written, or belongs to somebody else or is open to others, everything works without it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


def default_folder() -> Path:
    """``avl-edge/kernels`` where the user's caches are: $XDG_CACHE_HOME, or ``~/.cache``."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "avl-edge" / "kernels"


class CubinStore:
    """Entries by the text that identifies them."""

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._folder = folder or default_folder()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._usable = _is_private(self._folder)
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            self._usable = False

    def path(self, identity: str) -> Path:
        """The file of an entry."""
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.cubin"

    def get(self, identity: str) -> bytes | None:
        """The entry's content; None when it is not there, not whole, or not one's own."""
        if not self._usable:
            return None
        try:
            content = self.path(identity).read_bytes()
        except OSError:
            return None
        digest, image = content[:_DIGEST], content[_DIGEST:]
        return image if image and hashlib.sha256(image).digest() == digest else None

    def put(self, identity: str, image: bytes) -> None:
        """Write an entry beside its place and move it there in one step: readers find the old one or the new one."""
        if not self._usable:
            return
        target, staged = self.path(identity), None
        try:
            handle, staged = tempfile.mkstemp(dir=self._folder, prefix="staged-")
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(image).digest() + image)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        except OSError:
            if staged is not None:
                Path(staged).unlink(missing_ok=True)


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user can put files into a folder: what lies there is run."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077
