"""The kernels' sources: where they lie, and what identifies them. A source is a ``.cu`` file with what it includes."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from .errors import NoCuda

NAME, LOW_RANK = "core_attention.cu", "low_rank.cu"
_HERE = Path(__file__).resolve().parent
FOLDERS = (_HERE, _HERE.parents[2] / "plugins" / "cuda")
"""In an installed package (setup.py copies them), and in the repository."""
_INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def path(name: str = NAME) -> Path:
    """A file of the sources; :class:`NoCuda` where an installation lost it."""
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise NoCuda(f"{name} is not in {FOLDERS[0]}: install avl-edge again")


@lru_cache
def read(name: str = NAME) -> dict[str, bytes]:
    """The texts of a source and of all that it includes, by file name, itself first.

    Read once: what is compiled and what is digested are the same bytes.
    """
    files: dict[str, bytes] = {}
    missing = [name]
    while missing:
        each = missing.pop()
        if each not in files:
            files[each] = path(each).read_bytes()
            missing += _INCLUDED.findall(files[each].decode())
    return files


def identity(name: str = NAME) -> str:
    """SHA-256 of all bytes of a source: for the cache of what was compiled."""
    return _sha256(b"\0".join(part for each in sorted(read(name).items()) for part in (each[0].encode(), each[1])))


def digest(name: str = NAME) -> str:
    """SHA-256 of a source without its comments and spacing: another one, other kernels."""
    texts = (re.sub(r"//.*", "", text.decode()) for _, text in sorted(read(name).items()))
    return _sha256(" ".join(" ".join(texts).split()).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
