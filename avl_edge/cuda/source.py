"""The kernels' source: where it lies, and what identifies it."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from .errors import NoCuda

NAME = "core_attention.cu"
_HERE = Path(__file__).resolve().parent
_PLACES = (_HERE / NAME, _HERE.parents[1] / "plugins" / "cuda" / NAME)
"""In an installed package (setup.py copies it), and in the repository."""


@lru_cache(maxsize=1)
def path() -> Path:
    """The source file; :class:`NoCuda` where an installation lost it."""
    for place in _PLACES:
        if place.is_file():
            return place
    raise NoCuda(f"{NAME} is not in {_HERE}: install avl-edge again")


@lru_cache(maxsize=1)
def read() -> bytes:
    """The source's text, read once: what is compiled and what is digested are the same bytes."""
    return path().read_bytes()


def digest() -> str:
    """SHA-256, in hexadecimal digits, of the source without its comments and spacing: another one, other kernels."""
    code = re.sub(r"//.*", "", read().decode())
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()
