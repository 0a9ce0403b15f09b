"""Ownership of rows: pages, ids, and leases. Moves no bytes.

A row is the K and V of one token in one layer. All layers and all requests draw from one list of pages, since a page
weighs the same whatever it holds; which layer and tier a row serves is its owner's knowledge. A page belongs to one
lease and serves one format until it is empty, so that what a lease was promised is always there, however the formats
of its rows and those of others change. A row is counted once, under the lease that it was taken for, whoever else
reads it (:mod:`avl_edge.kv.pool.borrowing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...config import KvShape
from ...errors import Busy, PoolExhausted
from ..layout import PAGE_ROWS, Format, Packing, packing, page_bytes

Ids = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]


@dataclass(eq=False)
class Lease:
    """One request's share of the pool: at most ``limit`` pages at a time, set aside when it was granted.

    ``rows`` counts the rows that it holds in each of its pages; ``free`` are the ids still to be had there, by format;
    ``nbytes`` what its rows weigh; ``peak`` the most pages it ever held.
    """

    limit: int
    rows: Counter[int] = field(default_factory=Counter)
    free: dict[str, list[int]] = field(default_factory=dict)
    nbytes: int = 0
    peak: int = 0

    @property
    def held(self) -> int:
        """Pages in which this lease has rows."""
        return len(self.rows)


class Owner(Protocol):
    """Who holds rows: under one lease, and able to say which, by format."""

    @property
    def lease(self) -> Lease: ...

    def held(self) -> Iterator[tuple[str, Ids]]: ...


class RowPool:
    """``pages`` pages for rows of ``shape``, handed out lowest free page last freed first.

    A lease sets pages aside at admission, so that no request that was admitted ever finds the pool empty.
    """

    def __init__(self, pages: int, shape: KvShape) -> None:
        self.pages = pages
        self.shape = shape
        self._free = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self._free_count = pages
        self._taken = np.zeros((pages, PAGE_ROWS), dtype=np.bool_)  # by page and slot; as wide as was needed yet
        self._owners: dict[int, tuple[Lease, Packing]] = {}  # of the pages in use: who took it, and what for
        self._leases: set[Lease] = set()
        self._dirty = np.zeros(pages, dtype=np.bool_)  # pages that were in use since `take_dirty_pages` gave them last

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.shape)

    @property
    def pages_unreserved(self) -> int:
        """Pages that no lease has set aside."""
        return self.pages - sum((lease.limit for lease in self._leases), 0)

    @property
    def bytes_in_use(self) -> int:
        """What the rows that are held weigh."""
        held = self._taken.sum(1)
        return sum(int(held[page]) * pack.row_bytes for page, (_, pack) in self._owners.items())

    def packing(self, format_: str) -> Packing:
        """How rows of a format lie in this pool's pages."""
        return packing(Format(format_), self.shape, self.pages)

    def lease(self, limit: int) -> Lease:
        """Set ``limit`` pages aside; :class:`Busy` when they are not there."""
        if limit > self.pages_unreserved:
            raise Busy(f"{limit} pages were asked of a pool with {self.pages_unreserved} to give")
        lease = Lease(limit)
        self._leases.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Give a lease back. All its rows must have been released."""
        if lease.rows:
            raise PoolExhausted(f"a lease that still holds rows in {lease.held} pages cannot end")
        self._leases.discard(lease)

    def allocate(self, count: int, lease: Lease, format_: str = "exact") -> Ids:
        """``count`` row ids of a format, int32; :class:`PoolExhausted` beyond the lease.

        Rows that the lease left free in its pages are taken first: it never holds more pages of a format than the
        most rows of that format that it held at once need.
        """
        self._check_open(lease)
        free, pack = lease.free.setdefault(format_, []), self.packing(format_)
        if count > len(free):
            self._take_pages(-(-(count - len(free)) // pack.rows), lease, pack, free)
        ids: Ids = np.array(free[len(free) - count :][::-1], dtype=np.int32)
        del free[len(free) - count :]
        pages, slots = pack.places(ids)
        self._taken[pages, slots] = True
        self._charge(pages, lease, count * pack.row_bytes)
        return ids

    def _take_pages(self, count: int, lease: Lease, pack: Packing, free: list[int]) -> None:
        self._check_limit(lease.held + count, lease)
        start = self._free_count - count
        pages = self._free[start : self._free_count].astype(np.int64)
        self._free_count = start
        self._widen(pack.rows)
        self._dirty[pages] = True
        self._owners.update(dict.fromkeys(pages.tolist(), (lease, pack)))
        rows = pack.ids(pages[:, None], np.arange(pack.rows - 1, -1, -1))
        free[:0] = rows.flatten().tolist()  # under those that were free before, the lowest on top

    def release(self, ids: Ids, lease: Lease, format_: str = "exact") -> None:
        """Give rows of a lease back; they are free at once."""
        pack = self.packing(format_)
        pages, slots = pack.places(ids)
        if not np.all(self._taken[pages, slots]):
            raise PoolExhausted("a row was freed twice")
        self._taken[pages, slots] = False
        lease.nbytes -= len(ids) * pack.row_bytes
        places, rows = pages.tolist(), ids.tolist()
        for page, count in Counter(places).items():
            lease.rows[page] -= count
        left = {page for page in places if not lease.rows[page]}
        if left:
            rows = [row for page, row in zip(places, rows, strict=True) if page not in left]
        lease.free.setdefault(format_, []).extend(rows)
        self._leave(left, lease, pack)

    def _leave(self, pages: set[int], lease: Lease, pack: Packing) -> None:
        """``lease`` holds nothing in ``pages`` any more; they go back to the pool."""
        free = lease.free.get(pack.format.name)
        if pages and free:
            lease.free[pack.format.name] = _of_pages(free, pack, set(lease.rows) - pages)
        for page in sorted(pages, reverse=True):
            del lease.rows[page]
            del self._owners[page]
            self._free[self._free_count] = page
            self._free_count += 1

    def _charge(self, pages: Index, lease: Lease, nbytes: int) -> None:
        lease.rows.update(pages.tolist())
        lease.nbytes += nbytes
        lease.peak = max(lease.peak, lease.held)

    def _check_open(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise PoolExhausted("the lease has ended")

    @staticmethod
    def _check_limit(pages: int, lease: Lease) -> None:
        if pages > lease.limit:
            raise PoolExhausted(f"{pages} pages exceed a lease of {lease.limit}")

    def pages_of(self, lease: Lease) -> dict[str, list[int]]:
        """The pages that a lease holds by their formats, the fullest first."""
        found: dict[str, list[int]] = {}
        for page in sorted(lease.rows, key=lambda page: (-lease.rows[page], page)):
            found.setdefault(self._owners[page][1].format.name, []).append(page)
        return found

    def compact(self, lease: Lease, format_: str) -> tuple[Ids, Ids]:
        """Move a lease's rows of a format into as few pages as hold them: the ids of those that move, before and after.

        The fullest pages stay, and the other pages' rows go to what is free there. Their bytes have to follow before
        any row is written. Nobody else may read the lease's rows.
        """
        pack, pages = self.packing(format_), self.pages_of(lease).get(format_, [])
        kept = -(-sum(lease.rows[page] for page in pages) // pack.rows)
        leaving = np.array(sorted(pages[kept:]), dtype=np.int64)
        at, slots = np.nonzero(self._taken[leaving, : pack.rows])
        before = pack.ids(leaving[at], slots).astype(np.int32)
        stays, free = set(pages[:kept]), lease.free.get(format_, [])
        after: Ids = np.array(_of_pages(free, pack, stays)[: len(before)], dtype=np.int32)
        if len(after) != len(before):
            raise PoolExhausted("a lease has lost count of its free rows")
        if len(before):
            taken = set(after.tolist())
            lease.free[format_] = [row for row in free if row not in taken]
            self._taken[pack.places(after)] = True
            self._charge(pack.places(after)[0], lease, len(after) * pack.row_bytes)
            self.release(before, lease, format_)
        return before, after

    def shrink_lease(self, lease: Lease, limit: int) -> None:
        """Promise a lease no more than ``limit`` pages from now on; what it no longer needs others may be promised.

        :class:`PoolExhausted` below what it holds, and above what it was promised.
        """
        if not lease.held <= limit <= lease.limit:
            raise PoolExhausted(f"a lease of {lease.limit} pages that holds {lease.held} cannot become one of {limit}")
        lease.limit = limit

    def take_dirty_pages(self) -> Index:
        """Free pages, ascending, that were in use since this gave them last: their memory may go back to the system."""
        free = np.sort(self._free[: self._free_count]).astype(np.int64)
        dirty = free[self._dirty[free]]
        self._dirty[dirty] = False
        return dirty

    def _widen(self, slots: int) -> None:
        missing = slots - self._taken.shape[1]
        if missing > 0:
            self._taken = np.pad(self._taken, ((0, 0), (0, missing)))

    def rebuild(self, owners: Iterable[Owner]) -> None:
        """Make the books anew from what ``owners`` hold; every other row and lease is given up.

        An interrupt may fall between two lines of any method here. After it nobody's half-done change counts: the
        only truth is who is still there.
        """
        owners = list(owners)
        self._owners = {}
        self._taken[:] = False
        for owner in owners:
            self._recount(owner)
        self._leases = {owner.lease for owner in owners}
        for page, (lease, pack) in self._owners.items():
            slots = np.flatnonzero(~self._taken[page, : pack.rows])[::-1]
            free = lease.free.setdefault(pack.format.name, [])
            free += pack.ids(np.array(page), slots).tolist()
        unused = sorted(set(range(self.pages)) - self._owners.keys(), reverse=True)
        self._free[: len(unused)] = unused
        self._free_count = len(unused)

    def _recount(self, owner: Owner) -> None:
        lease = owner.lease
        lease.rows, lease.free, lease.nbytes = Counter(), {}, 0
        peak = lease.peak
        for format_, ids in owner.held():
            pack = self.packing(format_)
            self._widen(pack.rows)
            pages, slots = pack.places(ids)
            self._taken[pages, slots] = True
            self._charge(pages, lease, len(ids) * pack.row_bytes)
            self._owners.update(dict.fromkeys(pages.tolist(), (lease, pack)))
        lease.peak = peak

    def check_integrity(self, owners: Iterable[Owner]) -> None:
        """Assert that every row is free or held by one owner, under its lease and in one of its tiers."""
        counted = np.zeros(self._taken.shape, dtype=np.int32)
        for owner in owners:
            pages: Counter[int] = Counter()
            weight = 0
            own = np.zeros_like(counted)
            for format_, ids in owner.held():
                pack = self.packing(format_)
                where = pack.places(ids)
                np.add.at(own, where, 1)
                pages.update(where[0].tolist())
                weight += len(ids) * pack.row_bytes
                mine = (owner.lease, pack)
                assert all(self._owners[page] == mine for page in set(where[0].tolist())), "a page of two formats"
            assert own.max(initial=0) <= 1, "a row stands twice in one owner"
            assert +owner.lease.rows == pages, "a lease counts other rows than its owner holds"
            assert owner.lease.nbytes == weight, "a lease weighs other bytes than its rows"
            assert owner.lease.held <= owner.lease.limit, "a lease holds more than it was promised"
            counted += own
        assert np.array_equal(counted, self._taken), "a row is held by two, or by nobody"
        used = set(np.flatnonzero(counted.any(1)).tolist())
        assert used == self._owners.keys(), "a page in use has no owner, or an empty one has"
        for lease in {lease for lease, _ in self._owners.values()}:
            self._check_free(lease)
        free = self._free[: self._free_count].tolist()
        assert len(set(free)) == len(free), "a page is free twice"
        assert not set(free) & used, "a held page is on the free list"
        assert len(free) + len(used) == self.pages, "pages were lost"
        assert self.pages_unreserved >= 0, "more was promised than there is"

    def _check_free(self, lease: Lease) -> None:
        for format_, rows in lease.free.items():
            assert len(set(rows)) == len(rows), "a row is free twice"
            pages, slots = self.packing(format_).places(np.array(rows, dtype=np.int32))
            assert all(self._owners[page][0] is lease for page in pages.tolist()), "a free row lies in another's page"
            assert not np.any(self._taken[pages, slots]), "a held row is free"


def _of_pages(rows: list[int], pack: Packing, pages: set[int]) -> list[int]:
    """Those of ``rows`` that lie in ``pages``."""
    of = pack.places(np.array(rows, dtype=np.int32))[0].tolist()
    return [row for row, page in zip(rows, of, strict=True) if page in pages]
