"""Ownership of rows: pages, ids, and leases. Moves no bytes.

A row is the K and V of one token in one layer. All layers and all requests draw from one list of pages, since a page
weighs the same whatever it holds; which layer and tier a row serves is its owner's knowledge. A page belongs to one
lease and serves one format until it is empty, so that what a lease was promised is always there, however the formats
of its rows and those of others change. A row is counted once, under the lease that it was taken for, whoever else
reads it (:mod:`avl_edge.kv.pool.borrowing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from ...config import KvShape
from ...errors import Busy, PoolExhausted
from ..books import Account, Books, Columns, Ids, Index, Mask, Pages, Retiered, Share, books
from ..layout import Format, Packing, packing, page_bytes

__all__ = ["Ids", "Index", "Lease", "Owner", "RowPool"]


class Lease:
    """One request's share of the pool: at most :attr:`limit` pages at a time, set aside when it was granted."""

    def __init__(self, number: int, limit: int) -> None:
        """``number``: that no other lease of the pool has or had."""
        self.number = number
        self.account = Account(number, limit)
        self.shares: dict[str, Share] = {}

    @property
    def limit(self) -> int:
        return int(self.account.counts[3])

    @property
    def held(self) -> int:
        """Pages in which this lease has rows."""
        return int(self.account.counts[0])

    @property
    def nbytes(self) -> int:
        """What its rows weigh."""
        return int(self.account.counts[1])

    @property
    def peak(self) -> int:
        """The most pages it ever held."""
        return int(self.account.counts[2])


class Owner(Protocol):
    """Who holds rows: under one lease, and able to say which, by format."""

    @property
    def lease(self) -> Lease: ...

    def held(self) -> Iterator[tuple[str, Ids]]: ...


class RowPool:
    """``pages`` pages for rows of ``shape``, handed out lowest free page last freed first.

    A lease sets pages aside at admission, so that no request that was admitted ever finds the pool empty. What is
    known of a page stands in arrays, so that a lease ends in a time that depends on pages and not on rows.
    """

    def __init__(self, pages: int, shape: KvShape, books_: Books | None = None) -> None:
        """``books_``: the arithmetic, where it is not the fastest that there is."""
        self.pages = pages
        self.shape = shape
        self.books = books_ or books()
        self._pages = Pages(pages)
        self._leases: dict[int, Lease] = {}
        self._packings: list[Packing] = []  # by their numbers in `Pages.packing`
        self._granted = 0

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.shape)

    @property
    def pages_unreserved(self) -> int:
        """Pages that no lease has set aside."""
        return self.pages - sum((lease.limit for lease in self._leases.values()), 0)

    @property
    def bytes_in_use(self) -> int:
        """What the rows that are held weigh."""
        return sum(lease.nbytes for lease in self._leases.values())

    def packing(self, format_: str) -> Packing:
        """How rows of a format lie in this pool's pages."""
        return packing(Format(format_), self.shape, self.pages)

    def lease(self, limit: int) -> Lease:
        """Set ``limit`` pages aside; :class:`Busy` when they are not there."""
        if limit > self.pages_unreserved:
            raise Busy(f"{limit} pages were asked of a pool with {self.pages_unreserved} to give")
        self._granted += 1
        lease = Lease(self._granted, limit)
        self._leases[lease.number] = lease
        return lease

    def release_all(self, lease: Lease) -> None:
        """Give all rows of a lease back, page by page."""
        lease.shares = {}
        self._pages.leave(self._pages_of(lease)[::-1])
        lease.account.counts[:2] = 0

    def end(self, lease: Lease) -> None:
        """Give a lease back. All its rows must have been released."""
        if lease.held:
            raise PoolExhausted(f"a lease that still holds rows in {lease.held} pages cannot end")
        self._leases.pop(lease.number, None)

    def allocate(self, count: int, lease: Lease, format_: str = "exact") -> Ids:
        """``count`` row ids of a format, int32; :class:`PoolExhausted` beyond the lease.

        Rows that the lease left free in its pages are taken first: it never holds more pages of a format than the
        most rows of that format that it held at once need.
        """
        self._check_open(lease)
        return self.books.take(self._pages, self._share(lease, format_), count)

    def release(self, ids: Ids, lease: Lease, format_: str = "exact") -> None:
        """Give rows of a lease back; they are free at once."""
        self.books.release(self._pages, self._share(lease, format_), ids)

    def retier(
        self, lease: Lease, core: str, secondary: str, columns: Columns, wanted: Mask
    ) -> tuple[Retiered, Retiered]:
        """Move a lease's rows between two tiers of different formats: :meth:`~avl_edge.kv.books.Books.retier`."""
        self._check_open(lease)
        shares = (self._share(lease, core), self._share(lease, secondary))
        return self.books.retier(self._pages, *shares, columns, wanted)

    def _share(self, lease: Lease, format_: str) -> Share:
        share = lease.shares.get(format_)
        if share is None:
            pack = self.packing(format_)
            self._pages.widen(pack.rows)
            if pack not in self._packings:
                self._packings.append(pack)
            share = lease.shares[format_] = Share(lease.account, pack, self._packings.index(pack))
        return share

    def _check_open(self, lease: Lease) -> None:
        if lease.number not in self._leases:
            raise PoolExhausted("the lease has ended")

    def _pages_of(self, lease: Lease) -> Index:
        """Ascending."""
        return np.flatnonzero(self._pages.owner == lease.number)

    def pages_of(self, lease: Lease) -> dict[str, Index]:
        """The pages that a lease holds by their formats, the fullest first."""
        pages = self._pages_of(lease)
        pages = pages[np.argsort(-self._pages.held[pages], kind="stable")]
        numbers = self._pages.packing[pages]
        return {self._packings[each].format.name: pages[numbers == each] for each in np.unique(numbers).tolist()}

    def rows_in(self, pages: Index) -> int:
        """Rows that are held in some pages."""
        return int(self._pages.held[pages].sum())

    def compact(self, lease: Lease, format_: str) -> tuple[Ids, Ids]:
        """Move a lease's rows of a format into as few pages as hold them: the ids of those that move, before and after,
        ascending by the ones before.

        The fullest pages stay, and the other pages' rows go to what is free there. Their bytes have to follow before
        any row is written. Nobody else may read the lease's rows.
        """
        share, pages = self._share(lease, format_), self.pages_of(lease).get(format_, np.empty(0, dtype=np.int64))
        pack = share.packing
        kept = -(-self.rows_in(pages) // pack.rows)
        leaving = np.sort(pages[kept:])
        at, slots = np.nonzero(self._pages.taken[leaving, : pack.rows])
        before = np.sort(pack.ids(leaving[at], slots).astype(np.int32))
        free = share.free[: share.free_count[0]]
        stays = np.flatnonzero(np.isin(pack.places(free)[0], pages[:kept]))[: len(before)]
        if len(stays) != len(before):
            raise PoolExhausted("a lease has lost count of its free rows")
        if len(before):
            # What `take` gives is on top of the stack.
            rest = np.delete(free, stays)
            after: Ids = free[stays]
            share.free[: len(rest)], share.free[len(rest) : len(free)] = rest, after[::-1]
            after = self.books.take(self._pages, share, len(before))
            self.books.release(self._pages, share, before)
            return before, after
        return before, before

    def shrink_lease(self, lease: Lease, limit: int) -> None:
        """Promise a lease no more than ``limit`` pages from now on; what it no longer needs others may be promised.

        :class:`PoolExhausted` below what it holds, and above what it was promised.
        """
        if not lease.held <= limit <= lease.limit:
            raise PoolExhausted(f"a lease of {lease.limit} pages that holds {lease.held} cannot become one of {limit}")
        lease.account.counts[3] = limit

    def take_dirty_pages(self) -> Index:
        """Free pages, ascending, that were in use since this gave them last: their memory may go back to the system."""
        dirty = np.flatnonzero(self._pages.dirty & (self._pages.owner < 0))
        self._pages.dirty[dirty] = False
        return dirty

    def rebuild(self, owners: Iterable[Owner]) -> None:
        """Make the books anew from what ``owners`` hold; every other row and lease is given up.

        An interrupt may fall between two lines of any method here. After it nobody's half-done change counts: the
        only truth is who is still there.
        """
        owners = list(owners)
        pages, dirty = Pages(self.pages), self._pages.dirty
        pages.widen(self._pages.taken.shape[1])
        pages.dirty[:] = dirty
        self._pages = pages
        for owner in owners:
            self._recount(owner)
        self._leases = {owner.lease.number: owner.lease for owner in owners}
        pages.free_count[0] = 0
        pages.leave(np.flatnonzero(pages.owner < 0)[::-1])

    def _recount(self, owner: Owner) -> None:
        lease, pages = owner.lease, self._pages
        lease.shares = {}
        lease.account.counts[:2] = 0
        for format_, ids in owner.held():
            share = self._share(lease, format_)
            at, slots = share.packing.places(ids)
            pages.taken[at, slots] = True
            np.add.at(pages.held, at, 1)
            pages.owner[at], pages.packing[at] = lease.number, share.number
            lease.account.counts[1] += len(ids) * share.packing.row_bytes
        for share in lease.shares.values():
            self._count_free(share)
        lease.account.counts[0] = np.count_nonzero(pages.owner == lease.number)

    def _count_free(self, share: Share) -> None:
        """Fill a share's stack with the rows of its pages that are not taken."""
        pages, pack = self._pages, share.packing
        own = np.flatnonzero((pages.owner == share.account.number) & (pages.packing == share.number))
        at, slots = np.nonzero(~pages.taken[own, : pack.rows])
        free = pack.ids(own[at], slots)
        share.reserve(len(free))
        share.free[: len(free)] = free[::-1]
        share.free_count[0] = len(free)

    def check_integrity(self, owners: Iterable[Owner]) -> None:
        """Assert that every row is free or held by one owner, under its lease and in one of its tiers."""
        pages, owners = self._pages, list(owners)
        for owner in owners:  # a format of which nobody holds a row yet may have more slots to a page
            for format_, _ in owner.held():
                self._share(owner.lease, format_)
        used, free = pages.owner >= 0, pages.free[: pages.free_count[0]]
        counted = np.zeros(pages.taken.shape, dtype=np.int32)
        for owner in owners:
            own = self._counted(owner)
            assert own.max(initial=0) <= 1, "a row stands twice in one owner"
            assert np.array_equal(own.any(1), pages.owner == owner.lease.number), "a lease's pages are not its owner's"
            assert owner.lease.held == np.count_nonzero(own.any(1)), "a lease counts other pages than its owner holds"
            assert owner.lease.held <= owner.lease.limit, "a lease holds more than it was promised"
            counted += own
        assert np.array_equal(counted[used], pages.taken[used]), "a row is held by two, or by nobody"
        assert np.array_equal(counted.sum(1), pages.held), "a page counts other rows than there are in it"
        assert np.array_equal(counted.any(1), used), "a page in use has no owner, or an empty one has"
        assert len(np.unique(free)) == len(free), "a page is free twice"
        assert not np.any(used[free]), "a held page is on the free list"
        assert len(free) + np.count_nonzero(used) == self.pages, "pages were lost"
        assert self.pages_unreserved >= 0, "more was promised than there is"
        for lease in self._leases.values():
            for share in lease.shares.values():
                self._check_free(share)

    def _counted(self, owner: Owner) -> Ids:
        """How often an owner holds each row of each page."""
        own, weight = np.zeros(self._pages.taken.shape, dtype=np.int32), 0
        for format_, ids in owner.held():
            share = self._share(owner.lease, format_)
            at, slots = share.packing.places(ids)
            np.add.at(own, (at, slots), 1)
            weight += len(ids) * share.packing.row_bytes
            assert np.all(self._pages.packing[at] == share.number), "a page of two formats"
        assert owner.lease.nbytes == weight, "a lease weighs other bytes than its rows"
        return own

    def _check_free(self, share: Share) -> None:
        """A share's stack has each row of its pages that is not taken, once."""
        pages, free = self._pages, share.free[: share.free_count[0]]
        assert len(np.unique(free)) == len(free), "a row is free twice"
        at, slots = share.packing.places(free)
        own = (pages.owner == share.account.number) & (pages.packing == share.number)
        assert np.all(own[at]), "a free row lies in another's page"
        assert not np.any(pages.taken[at, slots]), "a held row is free"
        room = np.count_nonzero(own) * share.packing.rows
        assert len(free) == room - int(pages.held[own].sum()), "a free row was lost"
