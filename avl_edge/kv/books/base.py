"""What the books of a pool and of its sequences consist of: arrays, that the native library and numpy both work on."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import PoolExhausted
from ..layout import PAGE_ROWS, Packing

Ids = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

NOBODY = -1
FREED_TWICE = "a row was freed twice"

# The structures of plugins/cpu/books.cpp, whose arrays stay where they are until a structure is packed anew.
_POOL = struct.Struct("8q")
_SHARE = struct.Struct("4q7i4x")


def address(array: Array) -> int:
    """Where an array's first element lies."""
    try:  # ten times as fast, for arrays in one piece that may be written
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return int(array.ctypes.data)


class Pages:
    """Who has which of a pool's ``count`` pages, and which of their rows are taken.

    ``taken`` bool ``[pages, slots]``, as wide as was needed yet, void for a page that nobody owns; ``held`` int32
    ``[pages]``, rows taken; ``owner`` int32 ``[pages]``, a lease's number or :data:`NOBODY`; ``packing`` int16
    ``[pages]``, the number of a format; ``dirty`` bool ``[pages]``; ``free`` int32 ``[pages]``, a stack of
    ``free_count`` int64 ``[1]`` pages.
    """

    def __init__(self, count: int) -> None:
        self.taken: Mask = np.zeros((count, PAGE_ROWS), dtype=np.bool_)
        self.held: Ids = np.zeros(count, dtype=np.int32)
        self.owner: Ids = np.full(count, NOBODY, dtype=np.int32)
        self.packing = np.zeros(count, dtype=np.int16)
        self.dirty: Mask = np.zeros(count, dtype=np.bool_)
        self.free: Ids = np.arange(count - 1, -1, -1, dtype=np.int32)
        self.free_count: Index = np.array([count], dtype=np.int64)
        self.widen(PAGE_ROWS)

    def widen(self, slots: int) -> None:
        """Make room for formats of so many rows in a page."""
        missing = slots - self.taken.shape[1]
        if missing > 0:
            self.taken = np.pad(self.taken, ((0, 0), (0, missing)))
        arrays: list[Array] = [self.taken, self.held, self.owner, self.packing, self.dirty, self.free, self.free_count]
        self.packed = _POOL.pack(*[address(each) for each in arrays], self.taken.shape[1])

    def leave(self, pages: Index) -> None:
        """Make some pages nobody's; the last of them is taken first."""
        begin = int(self.free_count[0])
        self.owner[pages], self.held[pages] = NOBODY, 0
        self.free[begin : begin + len(pages)] = pages
        self.free_count[0] += len(pages)


class Account:
    """A lease's ``number``, and what it counts: ``counts`` int64 ``[4]``, pages held, bytes of the rows held, the most
    pages ever held, and the most that it may hold."""

    def __init__(self, number: int, limit: int) -> None:
        self.number = number
        self.counts: Index = np.array([0, 0, 0, limit], dtype=np.int64)


class Share:
    """What a lease has in one format: ``free`` int32, a stack of ``free_count`` int64 ``[1]`` ids that are still to be
    had in its pages."""

    def __init__(self, account: Account, packing: Packing, number: int) -> None:
        """``number``: of the format, as :class:`Pages` notes it."""
        self.account, self.packing, self.number = account, packing, number
        self.free: Ids = np.empty(packing.rows, dtype=np.int32)
        self.free_count: Index = np.zeros(1, dtype=np.int64)
        self._pack()

    def reserve(self, more: int) -> None:
        """Room for so many ids beside those that are free, and for the rest of a page."""
        needed = int(self.free_count[0]) + more + self.packing.rows
        if needed > len(self.free):
            self.free = np.concatenate([self.free, np.empty(needed, dtype=np.int32)])
            self._pack()

    def _pack(self) -> None:
        pack = self.packing
        addresses = (address(self.free), address(self.free_count), address(self.account.counts))
        steps = (pack.rows, pack.page_step, pack.row_step, pack.run, pack.arena_step)
        self.packed = _SHARE.pack(*addresses, pack.row_bytes, self.account.number, self.number, *steps)


@dataclass(frozen=True)
class Run:
    """Rows that stand side by side in a list of each layer, from ``begins`` int32 ``[L]`` on, and where they are taken
    from: ``column`` int32 ``[L, capacity]``, their ids or positions; ``counts`` int32 ``[L]``, how many are meant;
    ``core`` bool ``[L, capacity]`` and ``tier``: only those whose core is that, all where ``core`` is None."""

    begins: Ids
    column: Ids
    counts: Ids
    core: Mask | None = None
    tier: bool = True


class Retiered(NamedTuple):
    """Rows that went from one format to another, layer by layer: positions, ids before and after, int32 ``[n]`` each;
    ``ends`` int64 ``[L]``: how many up to the end of each layer."""

    positions: Ids
    before: Ids
    after: Ids
    ends: Index


class Columns(NamedTuple):
    """A table's arrays: ``ids`` and ``positions`` int32 ``[L, capacity]``, ``counts`` int32 ``[L]``; where rows have
    tiers, also ``core`` bool ``[L, capacity]`` and ``core_counts`` int32 ``[L]``."""

    ids: Ids
    positions: Ids
    counts: Ids
    core: Mask | None = None
    core_counts: Ids | None = None

    def of(self, layers: slice) -> Columns:
        """Those of some layers."""
        core = None if self.core is None else self.core[layers]
        core_counts = None if self.core_counts is None else self.core_counts[layers]
        return Columns(self.ids[layers], self.positions[layers], self.counts[layers], core, core_counts)


class Gone(NamedTuple):
    """Rows that left a table, layer by layer: ``ids`` and ``positions`` int32 ``[n]``, and which were core, bool
    ``[n]``; void where rows have no tiers."""

    ids: Ids
    positions: Ids
    core: Mask


class Books(Protocol):
    """Each works on the arrays that it is given, in place. Masks are in one piece, and as wide as a layer has rows at
    most, or wider."""

    def take(self, pages: Pages, share: Share, count: int) -> Ids:
        """``count`` row ids for a share, int32: those that are free in its pages first, then of new pages, the last one
        freed first. :class:`~avl_edge.errors.PoolExhausted` beyond the lease."""
        ...

    def release(self, pages: Pages, share: Share, ids: Ids) -> None:
        """Give rows of a share back; a page in which none is left is nobody's.
        :class:`~avl_edge.errors.PoolExhausted`, and nothing changed, where one is not taken."""
        ...

    def retier(
        self, pages: Pages, core: Share, secondary: Share, columns: Columns, wanted: Mask
    ) -> tuple[Retiered, Retiered]:
        """Make ``wanted`` ``[L, width]`` the core, and give rows that change their tier ids of its share: those that
        leave the core, and those that enter it.

        Two rows that change places take each other's ids, so that no page is left or taken for them. The others go
        layer by layer, and what one leaves another may take. So the bytes of a layer's rows are read before those of a
        later layer are written, and those of a layer, or of neighbouring ones, all before any of these is written.
        """
        ...

    def set_core(self, columns: Columns, wanted: Mask) -> None:
        """Make ``wanted`` ``[L, width]`` the core of rows whose format does not depend on it."""
        ...

    def compress(self, columns: Columns, keep: Mask) -> Gone:
        """Keep of each layer the rows in ``keep`` ``[L, width]``, side by side; the others."""
        ...

    def gather(self, runs: Sequence[Run], rows: Ids) -> None:
        """Write each run into ``rows`` ``[L, capacity]``."""
        ...

    def scatter(self, runs: Sequence[Run], scores: Array, to: Array) -> None:
        """Undo :meth:`gather` for the ``scores`` ``[L, capacity]`` of rows that were listed so: ``to`` ``[L, width]``
        gets those of one run, side by side, or of the two tiers of a table, in the order of its rows."""
        ...

    def top(self, scores: Array, count: int) -> Mask:
        """Of each row of ``scores`` ``[m, n]``, contiguous float32 or float64, the ``count`` highest as a mask, from 1
        to n; of equals the first ones, NaN last."""
        ...


def refusal(account: Account, pages: int) -> PoolExhausted:
    """Of ``pages`` more for a lease."""
    held, limit = int(account.counts[0]), int(account.counts[3])
    return PoolExhausted(f"{held + pages} pages exceed a lease of {limit}")
