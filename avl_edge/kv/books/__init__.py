"""The arithmetic of pages and row tables, for all layers of a sequence or of a batch in one call: natively, or in numpy
where the library was not built. `base` says what each function does."""

from __future__ import annotations

from functools import lru_cache

from .base import Account, Books, Columns, Gone, Ids, Index, Mask, Pages, Retiered, Run, Share
from .native import NativeBooks, library
from .plain import PlainBooks

__all__ = [
    "Account",
    "Books",
    "Columns",
    "Gone",
    "Ids",
    "Index",
    "Mask",
    "NativeBooks",
    "Pages",
    "PlainBooks",
    "Retiered",
    "Run",
    "Share",
    "books",
]


@lru_cache(maxsize=1)
def books() -> Books:
    """The fastest that there are."""
    loaded = library()
    return PlainBooks() if loaded is None else NativeBooks(loaded)
