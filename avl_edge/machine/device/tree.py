"""Reading files of a machine: this one ("/"), or a recorded file tree that was copied from another.

Every path is looked up as if the root were the file system's: a symbolic link, absolute or with "..", leads to a
place inside the root or nowhere. Nothing here raises for what a tree holds; a reading says why it failed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import BadInput

MAX_LINKS = 40
MAX_ENTRIES = 4096
MAX_FILE = 1 << 20
"""Bytes. What the kernel and the device tree write is far smaller; a package database is read with a larger limit."""


@dataclass(frozen=True)
class Reading:
    """Text, or None and the reason."""

    text: str | None
    reason: str = ""


class Tree:
    """The files under ``root``; :class:`BadInput` if that is not a folder. Paths are absolute, as on the machine."""

    def __init__(self, root: str | Path = "/") -> None:
        if not os.path.isdir(root):
            raise BadInput(f"{root} is not a folder: give the root of a recorded file tree, or / for this machine")
        self.root = Path(root).resolve()
        self.live = self.root == Path("/")

    def read(self, path: str, limit: int = MAX_FILE) -> Reading:
        """The text of a file of at most ``limit`` bytes; bytes that are not UTF-8 become replacement characters."""
        try:
            content = _read_regular(self._resolve(path), limit)
        except OSError as error:
            return Reading(None, (error.strerror or str(error)).lower())
        except ValueError:
            return Reading(None, "not a possible path")
        if len(content) > limit:
            return Reading(None, f"larger than {limit} bytes")
        return Reading(content.decode("utf-8", "replace"))

    def exists(self, path: str) -> bool:
        """Is there anything at ``path``, links followed?"""
        try:
            return os.path.lexists(self._resolve(path))
        except (OSError, ValueError):
            return False

    def names(self, path: str) -> list[str]:
        """The names in a folder, ``x2`` before ``x10``; none if it cannot be listed."""
        try:
            with os.scandir(self._resolve(path)) as entries:
                found = [entry.name for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
        except (OSError, ValueError):
            return []
        return sorted(found, key=lambda name: (len(name), name))

    def glob(self, pattern: str) -> list[str]:
        """The paths that match ``pattern``, where ``*`` stays within one folder's name."""
        found = [""]
        for part in pattern.strip("/").split("/"):
            if not any(sign in part for sign in "*?["):
                found = [f"{path}/{part}" for path in found]
            else:
                found = [f"{path}/{name}" for path in found for name in self.names(path) if fnmatchcase(name, part)]
        return [path for path in found if self.exists(path)]

    def _resolve(self, path: str) -> str:
        """Where ``path`` lies, with every link followed inside the root; OSError where links go in a circle."""
        parts, place, links = deque(path.split("/")), list[str](), 0
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                del place[-1:]
                continue
            try:
                target = os.readlink(os.path.join(self.root, *place, part))
            except OSError:  # not a link, or not there: opening it will tell
                place.append(part)
                continue
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, "a circle of symbolic links")
            if target.startswith("/"):
                place.clear()
            parts.extendleft(reversed(target.split("/")))
        return os.path.join(self.root, *place)


def _read_regular(path: str, limit: int) -> bytes:
    """Up to ``limit`` + 1 bytes of a regular file; others, such as pipes and devices, could block for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        chunks, left = list[bytes](), limit + 1
        while left > 0 and (chunk := os.read(handle, left)):
            chunks.append(chunk)
            left -= len(chunk)
    finally:
        os.close(handle)
    return b"".join(chunks)
