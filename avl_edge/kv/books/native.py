"""The books in C++: `plugins/cpu/books.cpp`, which `pip install` builds into this folder as a shared library with a C
interface. Needs no torch. A call keeps the interpreter's lock, since it takes microseconds, and whoever gives the lock
away between two of them may wait for milliseconds until it has it again.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from ...errors import PoolExhausted
from .base import (
    FREED_TWICE,
    Array,
    Columns,
    Gone,
    Ids,
    Mask,
    Pages,
    Retiered,
    Run,
    Share,
    address,
    refusal,
)

DIRECTORY = Path(__file__).resolve().parent
"""Where the library is built."""

_BEYOND_LIMIT, _NO_PAGE, _FREED_TWICE = 1, 2, 3
_COLUMNS = struct.Struct("6q")
_RUN = struct.Struct("7q")
_FUNCTIONS = {
    "avl_take": "ppqp",
    "avl_release": "pppq",
    "avl_retier": "ppppqpqpqp",
    "avl_set_core": "pqpq",
    "avl_compress": "pqpqppp",
    "avl_gather": "pqqpq",
    "avl_scatter": "pqqpqpqq",
    "avl_top": "pqqqqp",
}
"""What each takes: p, an address or packed structures, or q, a number."""


@lru_cache(maxsize=1)
def library() -> ctypes.PyDLL | None:
    """The library; None where it was not built, or cannot be loaded."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := DIRECTORY / f"_books{suffix}").is_file()]
    if not found:
        return None
    try:
        loaded = ctypes.PyDLL(str(found[0]))
        for name, takes in _FUNCTIONS.items():
            kinds = [ctypes.c_void_p if each == "p" else ctypes.c_int64 for each in takes]
            getattr(loaded, name).argtypes = kinds
        loaded.avl_compress.restype = ctypes.c_int64
    except (OSError, AttributeError):
        return None
    return loaded


class NativeBooks:
    """:class:`~avl_edge.kv.books.base.Books` by the native library."""

    def __init__(self, loaded: ctypes.PyDLL) -> None:
        self._library = loaded

    def take(self, pages: Pages, share: Share, count: int) -> Ids:
        share.reserve(count)
        ids = np.empty(count, dtype=np.int32)
        status = self._library.avl_take(pages.packed, share.packed, count, address(ids))
        if status:
            raise _error(status, share, count)
        return ids

    def release(self, pages: Pages, share: Share, ids: Ids) -> None:
        share.reserve(len(ids))
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        status = self._library.avl_release(pages.packed, share.packed, address(ids), len(ids))
        if status:
            raise _error(status, share, 0)

    def retier(
        self, pages: Pages, core: Share, secondary: Share, columns: Columns, wanted: Mask
    ) -> tuple[Retiered, Retiered]:
        layers, room = len(columns.counts), int(columns.counts.sum())
        core.reserve(room)
        secondary.reserve(room)
        moved, ends = np.empty((2, 3, room), dtype=np.int32), np.zeros((2, layers), dtype=np.int64)
        shares = (pages.packed, core.packed, secondary.packed)
        masks, out = (address(wanted), wanted.shape[1]), (address(moved), room, address(ends))
        status = self._library.avl_retier(*shares, _columns(columns), layers, *masks, *out)
        if status:
            raise _error(status, core, 1)
        leaving, entering = (
            Retiered(of[0, : end[-1]], of[1, : end[-1]], of[2, : end[-1]], end)
            for of, end in zip(moved, ends, strict=True)
        )
        return leaving, entering

    def set_core(self, columns: Columns, wanted: Mask) -> None:
        self._library.avl_set_core(_columns(columns), len(columns.counts), address(wanted), wanted.shape[1])

    def compress(self, columns: Columns, keep: Mask) -> Gone:
        ids, positions = np.empty((2, keep.size), dtype=np.int32)
        core = np.empty(keep.size, dtype=np.bool_)
        masks, out = (address(keep), keep.shape[1]), (address(ids), address(positions), address(core))
        count = self._library.avl_compress(_columns(columns), len(columns.counts), *masks, *out)
        return Gone(ids[:count], positions[:count], core[:count])

    def gather(self, runs: Sequence[Run], rows: Ids) -> None:
        self._library.avl_gather(_runs(runs), len(runs), len(rows), address(rows), _stride(rows))

    def scatter(self, runs: Sequence[Run], scores: Array, to: Array) -> None:
        where = (address(scores), _stride(scores), address(to), _stride(to))
        self._library.avl_scatter(_runs(runs), len(runs), len(scores), *where, scores.itemsize)

    def top(self, scores: Array, count: int) -> Mask:
        masks = np.empty(scores.shape, dtype=np.bool_)
        if self._library.avl_top(address(scores), *scores.shape, scores.itemsize, count, address(masks)):
            raise MemoryError("no memory to rank rows in")
        return masks


def _columns(columns: Columns) -> bytes:
    given = (columns.ids, columns.positions, columns.counts, columns.core, columns.core_counts)
    return _COLUMNS.pack(*[0 if each is None else address(each) for each in given], _stride(columns.ids))


def _stride(array: Array) -> int:
    return array.strides[0] // array.itemsize


def _runs(runs: Sequence[Run]) -> bytes:
    return b"".join([_pack(run) for run in runs])


def _pack(run: Run) -> bytes:
    core, core_stride = (0, 0) if run.core is None else (address(run.core), _stride(run.core))
    arrays = (address(run.begins), address(run.column), address(run.counts), core)
    return _RUN.pack(*arrays, _stride(run.column), core_stride, run.tier)


def _error(status: int, share: Share, count: int) -> BaseException:
    """What a function's status says; ``count`` rows were asked for."""
    if status == _BEYOND_LIMIT:
        missing = max(count - int(share.free_count[0]), 1)
        return refusal(share.account, -(-missing // share.packing.rows))
    if status in (_NO_PAGE, _FREED_TWICE):
        return PoolExhausted("no page is free" if status == _NO_PAGE else FREED_TWICE)
    return MemoryError("no memory for the books of a pool")
