"""Ownership of rows: pages, ids, reference counts, leases and tiers. Moves no bytes.

A row is the K and V of one token in one layer. All layers and all requests draw from one list of pages, since a page
weighs the same whatever it holds; which layer and tier a row serves is its owner's knowledge. A page belongs to one
lease and serves one format until it is empty, so that what a lease was promised is always there, however the formats
of its rows and those of others change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..config import Formats, KvShape
from ..errors import DoesNotFit, PoolExhausted
from ..layout import PAGE_ROWS, Format, Packing, packing, page_bytes

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]

_EMPTY = np.empty(0, dtype=np.int32)


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


class RowPool:
    """``pages`` pages for rows of ``shape``, handed out lowest free page last freed first, rows counted by reference.

    A lease sets pages aside at admission, so that no request that was admitted ever finds the pool empty.
    """

    def __init__(self, pages: int, shape: KvShape) -> None:
        self.pages = pages
        self.shape = shape
        self._free = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self._free_count = pages
        self._references = np.zeros((pages, PAGE_ROWS), dtype=np.int32)  # by page and slot; as wide as was needed yet
        self._owners: dict[int, tuple[Lease, Packing]] = {}  # of the pages in use: who took it, and what for
        self._leases: set[Lease] = set()
        self._worn = np.zeros(pages, dtype=np.bool_)  # pages that were in use since `take_worn` gave them last

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.shape)

    @property
    def pages_unreserved(self) -> int:
        """Pages that no lease has set aside."""
        return self.pages - sum((lease.limit for lease in self._leases), 0)

    @property
    def bytes_in_use(self) -> int:
        """What the rows that are held weigh, shared ones once."""
        held = (self._references > 0).sum(1)
        return sum(int(held[page]) * pack.row_bytes for page, (_, pack) in self._owners.items())

    def packing(self, format_: str) -> Packing:
        """How rows of a format lie in this pool's pages."""
        return packing(Format(format_), self.shape)

    def lease(self, limit: int) -> Lease:
        """Set ``limit`` pages aside; :class:`DoesNotFit` when they are not there."""
        if limit > self.pages_unreserved:
            raise DoesNotFit(f"{limit} pages were asked of a pool with {self.pages_unreserved} to give")
        lease = Lease(limit)
        self._leases.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Give a lease back. All its rows must have been released."""
        if lease.rows:
            raise PoolExhausted(f"a lease that still holds rows in {lease.held} pages cannot end")
        self._leases.discard(lease)

    def allocate(self, count: int, lease: Lease, format_: str = "exact") -> Ids:
        """``count`` row ids of a format, int32, each with one reference; :class:`PoolExhausted` beyond the lease.

        Rows that the lease left free in its pages are taken first: it never holds more pages of a format than the
        most rows of that format that it held at once need.
        """
        self._check_open(lease)
        free, pack = lease.free.setdefault(format_, []), self.packing(format_)
        if count > len(free):
            self._take_pages(-(-(count - len(free)) // pack.rows), lease, pack, free)
        ids: Ids = np.array(free[len(free) - count :][::-1], dtype=np.int32)
        del free[len(free) - count :]
        pages, slots = _places(ids, pack)
        self._references[pages, slots] = 1
        self._charge(pages, lease, count * pack.row_bytes)
        return ids

    def _take_pages(self, count: int, lease: Lease, pack: Packing, free: list[int]) -> None:
        self._check_limit(lease.held + count, lease)
        start = self._free_count - count
        pages = self._free[start : self._free_count].astype(np.int64)
        self._free_count = start
        self._widen(pack.rows)
        self._worn[pages] = True
        self._owners.update(dict.fromkeys(pages.tolist(), (lease, pack)))
        rows = pages[:, None] * pack.page_step + np.arange(pack.rows - 1, -1, -1) * pack.row_step
        free[:0] = rows.flatten().tolist()  # under those that were free before, the lowest on top

    def retain(self, ids: Ids, lease: Lease, format_: str = "exact") -> None:
        """Add a reference to rows that another lease holds; their pages count against both.

        A row that its first owner gives up while it is shared is not to be had again before its page is empty: who
        shares rows keeps them.
        """
        self._check_open(lease)
        pack = self.packing(format_)
        pages, slots = _places(ids, pack)
        if not np.all(self._references[pages, slots] > 0):
            raise PoolExhausted("a row that was freed cannot be shared")
        self._check_limit(len(lease.rows.keys() | set(pages.tolist())), lease)
        self._references[pages, slots] += 1
        self._charge(pages, lease, len(ids) * pack.row_bytes)

    def release(self, ids: Ids, lease: Lease, format_: str = "exact") -> None:
        """Drop one reference to each row; rows that nobody holds any more are free at once."""
        pack = self.packing(format_)
        pages, slots = _places(ids, pack)
        if not np.all(self._references[pages, slots] > 0):
            raise PoolExhausted("a row was freed twice")
        self._references[pages, slots] -= 1
        lease.nbytes -= len(ids) * pack.row_bytes
        for page, count in zip(*(each.tolist() for each in np.unique(pages, return_counts=True)), strict=True):
            lease.rows[page] -= count
        for page, row in zip(pages.tolist(), ids.tolist(), strict=True):
            owner = self._owners[page][0]
            if owner.rows[page] and not self._references[page, (row - page * pack.page_step) // pack.row_step]:
                owner.free.setdefault(format_, []).append(row)
        self._leave({page for page in pages.tolist() if not lease.rows[page]}, lease, pack)

    def _leave(self, pages: set[int], lease: Lease, pack: Packing) -> None:
        """``lease`` holds nothing in ``pages`` any more; those that nobody holds go back to the pool."""
        free = lease.free.get(pack.format.name)
        if pages and free:
            lease.free[pack.format.name] = [row for row in free if row // pack.page_step not in pages]
        for page in sorted(pages, reverse=True):
            del lease.rows[page]
            if not self._references[page].any():
                del self._owners[page]
                self._free[self._free_count] = page
                self._free_count += 1

    def _charge(self, pages: Index, lease: Lease, nbytes: int) -> None:
        for page, count in zip(*(each.tolist() for each in np.unique(pages, return_counts=True)), strict=True):
            lease.rows[page] += count
        lease.nbytes += nbytes
        lease.peak = max(lease.peak, lease.held)

    def _check_open(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise PoolExhausted("the lease has ended")

    @staticmethod
    def _check_limit(pages: int, lease: Lease) -> None:
        if pages > lease.limit:
            raise PoolExhausted(f"{pages} pages exceed a lease of {lease.limit}")

    def is_shared(self, lease: Lease) -> bool:
        """Whether pages that ``lease`` holds are, or were, another's too."""
        return any(self._owners[page][0] is not lease for page in lease.rows) or any(
            not lease.rows.keys().isdisjoint(other.rows) for other in self._leases if other is not lease
        )

    def pages_of(self, lease: Lease) -> dict[str, list[int]]:
        """The pages that a lease holds by their formats, the fullest first."""
        found: dict[str, list[int]] = {}
        for page in sorted(lease.rows, key=lambda page: (-lease.rows[page], page)):
            found.setdefault(self._owners[page][1].format.name, []).append(page)
        return found

    def crowd(self, lease: Lease, format_: str) -> tuple[Ids, Ids]:
        """Move a lease's rows of a format into as few pages as hold them: the ids of those that move, before and after.

        The fullest pages stay, and the other pages' rows go to what is free there. Their bytes have to follow before
        any row is written. The lease must not be shared.
        """
        pack, pages = self.packing(format_), self.pages_of(lease).get(format_, [])
        kept = -(-sum(lease.rows[page] for page in pages) // pack.rows)
        leaving = np.array(sorted(pages[kept:]), dtype=np.int64)
        at, slots = np.nonzero(self._references[leaving, : pack.rows])
        before = (leaving[at] * pack.page_step + slots * pack.row_step).astype(np.int32)
        stays, free = set(pages[:kept]), lease.free.get(format_, [])
        after: Ids = np.array([row for row in free if row // pack.page_step in stays][: len(before)], dtype=np.int32)
        assert len(after) == len(before), "a lease has lost count of its free rows"
        if len(before):
            taken = set(after.tolist())
            lease.free[format_] = [row for row in free if row not in taken]
            self._references[_places(after, pack)] = 1
            self._charge(_places(after, pack)[0], lease, len(after) * pack.row_bytes)
            self.release(before, lease, format_)
        return before, after

    def narrow(self, lease: Lease, limit: int) -> None:
        """Promise a lease no more than ``limit`` pages from now on; what it no longer needs others may be promised."""
        assert lease.held <= limit <= lease.limit, "a lease can neither grow nor hold more than it is promised"
        lease.limit = limit

    def take_worn(self) -> Index:
        """Free pages, ascending, that were in use since this gave them last: their memory may go back to the system."""
        free = np.sort(self._free[: self._free_count]).astype(np.int64)
        worn = free[self._worn[free]]
        self._worn[worn] = False
        return worn

    def _widen(self, slots: int) -> None:
        missing = slots - self._references.shape[1]
        if missing > 0:
            self._references = np.pad(self._references, ((0, 0), (0, missing)))

    def rebuild(self, owners: Iterable[SequenceRows]) -> None:
        """Make the books anew from what ``owners`` hold; every other row and lease is given up.

        An interrupt may fall between two lines of any method here. After it nobody's half-done change counts: the
        only truth is who is still there. A shared page stays its first owner's, whose promise counts on its free rows.
        """
        owners = list(owners)
        before, self._owners = self._owners, {}
        self._references[:] = 0
        for owner in owners:
            self._recount(owner, before)
        self._leases = {owner.lease for owner in owners}
        for page, (lease, pack) in self._owners.items():
            slots = np.flatnonzero(self._references[page, : pack.rows] == 0)[::-1]
            free = lease.free.setdefault(pack.format.name, [])
            free += (page * pack.page_step + slots * pack.row_step).tolist()
        unused = sorted(set(range(self.pages)) - self._owners.keys(), reverse=True)
        self._free[: len(unused)] = unused
        self._free_count = len(unused)

    def _recount(self, owner: SequenceRows, before: dict[int, tuple[Lease, Packing]]) -> None:
        lease = owner.lease
        lease.rows, lease.free, lease.nbytes = Counter(), {}, 0
        peak = lease.peak
        for format_, ids in owner.held():
            pack = self.packing(format_)
            self._widen(pack.rows)
            pages, slots = _places(ids, pack)
            self._references[pages, slots] += 1
            self._charge(pages, lease, len(ids) * pack.row_bytes)
            for page in set(pages.tolist()):
                if page not in self._owners or (page in before and before[page][0] is lease):
                    self._owners[page] = lease, pack
        lease.peak = peak

    def check_integrity(self, owners: Iterable[SequenceRows]) -> None:
        """Assert that every row is free or held, as often as it is counted, and in one tier of its owner."""
        counted = np.zeros_like(self._references)
        for owner in owners:
            pages: Counter[int] = Counter()
            weight = 0
            own = np.zeros_like(self._references)
            for format_, ids in owner.held():
                pack = self.packing(format_)
                where = _places(ids, pack)
                np.add.at(own, where, 1)
                pages.update(where[0].tolist())
                weight += len(ids) * pack.row_bytes
                assert all(self._owners[page][1] == pack for page in set(where[0].tolist())), "a page of two formats"
            assert own.max(initial=0) <= 1, "a row stands twice in one owner"
            assert +owner.lease.rows == pages, "a lease counts other rows than its owner holds"
            assert owner.lease.nbytes == weight, "a lease weighs other bytes than its rows"
            assert owner.lease.held <= owner.lease.limit, "a lease holds more than it was promised"
            counted += own
        assert np.array_equal(counted, self._references), "reference counts and holders differ"
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
            pages, slots = _places(np.array(rows, dtype=np.int32), self.packing(format_))
            assert all(self._owners[page][0] is lease for page in pages.tolist()), "a free row lies in another's page"
            assert not np.any(self._references[pages, slots]), "a held row is free"


def _places(ids: Ids, pack: Packing) -> tuple[Index, Index]:
    """Pages and slots of rows, int64."""
    pages, steps = np.divmod(ids.astype(np.int64), pack.page_step)
    return pages, steps // pack.row_step


@dataclass
class LayerRows:
    """One sequence's rows in one layer, each list ascending by position (int32).

    Tiers: text (``text_ids``), core (``image_ids[core]``), secondary (``image_ids[~core]``); an id is one of its
    tier's format. ``freed`` counts the rows that this layer gave up or never stored; ``basis`` are exact rows beside
    them, which hold what a packed format needs to be read.
    """

    text_positions: Ids = field(default_factory=lambda: _EMPTY)
    text_ids: Ids = field(default_factory=lambda: _EMPTY)
    image_positions: Ids = field(default_factory=lambda: _EMPTY)
    image_ids: Ids = field(default_factory=lambda: _EMPTY)
    core: Mask = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    freed: int = 0
    basis: Ids = field(default_factory=lambda: _EMPTY)

    def counts(self) -> dict[str, int]:
        core = int(self.core.sum())
        return {
            "text": len(self.text_ids),
            "core": core,
            "secondary": len(self.image_ids) - core,
            "freed": self.freed,
        }


@dataclass(frozen=True)
class Moved:
    """Image rows of a layer that change their format: their positions, ids before and after, and the formats."""

    positions: Ids
    before: Ids
    after: Ids
    old_format: str
    new_format: str


class SequenceRows:
    """All rows of one sequence, layer by layer, drawn from ``pool`` under one lease of ``limit`` pages."""

    def __init__(self, pool: RowPool, layers: int, limit: int, formats: Formats | None = None) -> None:
        self.pool = pool
        self.formats = (formats or Formats()).stored
        self.lease = pool.lease(limit)
        self.layers = [LayerRows() for _ in range(layers)]

    def fill(self, layer: int, text: Ids, image: Ids, core: Mask, freed: int) -> LayerRows:
        """Take rows for the prompt's ``text`` and ``image`` positions of one layer."""
        text_ids = self._allocate(len(text), self.formats.text)
        image_ids = self._allocate_image(core)
        self.layers[layer] = LayerRows(text, text_ids, image, image_ids, core, freed)
        return self.layers[layer]

    def _allocate(self, count: int, format_: str) -> Ids:
        return self.pool.allocate(count, self.lease, format_)

    def _allocate_image(self, core: Mask) -> Ids:
        formats = self.formats
        if formats.core == formats.secondary:
            return self._allocate(len(core), formats.core)
        ids = np.empty(len(core), dtype=np.int32)
        ids[core] = self._allocate(int(core.sum()), formats.core)
        ids[~core] = self._allocate(int((~core).sum()), formats.secondary)
        return ids

    def append(self, position: int) -> Ids:
        """One new text row in every layer, for the token at ``position``: an id per layer."""
        ids = self._allocate(len(self.layers), self.formats.text)
        for rows, row in zip(self.layers, ids, strict=True):
            rows.text_positions = np.append(rows.text_positions, np.int32(position))
            rows.text_ids = np.append(rows.text_ids, row)
        return ids

    def set_core(self, layer: int, core: Mask) -> list[Moved]:
        """Move image rows between core and secondary; ``core`` is a mask over the stored image rows.

        Where the tiers' formats differ, rows that change their tier get new ids; their bytes are still where the old
        ids say, and have to be read before anything is written to the new ones.
        """
        rows, formats = self.layers[layer], self.formats
        assert core.shape == rows.core.shape
        before, rows.core = rows.core, core
        if formats.core == formats.secondary:
            return []
        places = (np.flatnonzero(before & ~core), np.flatnonzero(~before & core))
        names = ((formats.core, formats.secondary), (formats.secondary, formats.core))
        old = [rows.image_ids[where] for where in places]
        for ids, (old_format, _) in zip(old, names, strict=True):
            self.pool.release(ids, self.lease, old_format)
        ids = rows.image_ids.copy()
        moved = []
        for where, was, (old_format, new_format) in zip(places, old, names, strict=True):
            ids[where] = self._allocate(len(where), new_format)
            moved.append(Moved(rows.image_positions[where], was, ids[where], old_format, new_format))
        rows.image_ids = ids
        return [each for each in moved if len(each.before)]

    def keep_text(self, layer: int, keep: Mask) -> None:
        """Free the text rows that ``keep``, a mask over this layer's text rows, leaves out."""
        rows = self.layers[layer]
        self.pool.release(rows.text_ids[~keep], self.lease, self.formats.text)
        rows.freed += int((~keep).sum())
        rows.text_positions = rows.text_positions[keep]
        rows.text_ids = rows.text_ids[keep]

    def keep_image(self, layer: int, keep: Mask) -> None:
        """Free the image rows that ``keep``, a mask over this layer's image rows, leaves out, of any tier."""
        rows = self.layers[layer]
        for tier, format_ in ((rows.core, self.formats.core), (~rows.core, self.formats.secondary)):
            self.pool.release(rows.image_ids[~keep & tier], self.lease, format_)
        rows.freed += int((~keep).sum())
        rows.image_positions = rows.image_positions[keep]
        rows.image_ids = rows.image_ids[keep]
        rows.core = rows.core[keep]

    def take_basis(self, layer: int, count: int) -> Ids:
        """``count`` exact rows beside the tiers of a layer."""
        self.layers[layer].basis = self._allocate(count, "exact")
        return self.layers[layer].basis

    def held(self) -> Iterator[tuple[str, Ids]]:
        """All rows by format, a few at a time."""
        for rows in self.layers:
            yield self.formats.text, rows.text_ids
            yield self.formats.core, rows.image_ids[rows.core]
            yield self.formats.secondary, rows.image_ids[~rows.core]
            yield "exact", rows.basis

    def fork(self, limit: int) -> SequenceRows:
        """A second owner of the same rows, with a core set and later text of its own.

        Their formats must not depend on the tier, since a row has one form for all who share it.
        """
        assert self.formats.core == self.formats.secondary
        other = SequenceRows(self.pool, len(self.layers), limit, self.formats)
        for format_, ids in self.held():
            self.pool.retain(ids, other.lease, format_)
        other.layers = [
            LayerRows(
                rows.text_positions,
                rows.text_ids,
                rows.image_positions,
                rows.image_ids,
                rows.core.copy(),
                rows.freed,
                rows.basis,
            )
            for rows in self.layers
        ]
        return other

    def close(self) -> None:
        """Free every row and end the lease. Closing twice is safe and does nothing."""
        for format_, ids in self.held():
            self.pool.release(ids, self.lease, format_)
        self.layers = [LayerRows() for _ in self.layers]
        self.pool.end(self.lease)

    def __iter__(self) -> Iterator[LayerRows]:
        return iter(self.layers)
