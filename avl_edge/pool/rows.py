"""Ownership of rows: ids, free list, reference counts, leases and tiers. Moves no bytes.

A row is the K and V of one token in one layer. All layers and all requests draw from one list of ids,
since a row weighs the same in every layer; which layer and tier an id serves is the owner's knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import DoesNotFit, PoolExhausted

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_EMPTY = np.empty(0, dtype=np.int32)


@dataclass(eq=False)
class Lease:
    """One request's share of the pool: at most ``limit`` rows at a time, set aside when it was granted."""

    limit: int
    held: int = 0
    peak: int = 0


class RowPool:
    """``capacity`` rows, handed out lowest free id last freed first, counted by reference.

    A lease sets rows aside at admission, so that no request that was admitted ever finds the pool empty.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity: int = capacity
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._free_count = capacity
        self._references = np.zeros(capacity, dtype=np.int32)
        self._leases: set[Lease] = set()

    @property
    def rows_in_use(self) -> int:
        return self.capacity - self._free_count

    @property
    def rows_unreserved(self) -> int:
        """Rows that no lease has set aside."""
        return self.capacity - sum((lease.limit for lease in self._leases), 0)

    def lease(self, limit: int) -> Lease:
        """Set ``limit`` rows aside; :class:`DoesNotFit` when they are not there."""
        if limit > self.rows_unreserved:
            raise DoesNotFit(f"{limit} rows were asked of a pool with {self.rows_unreserved} to give")
        lease = Lease(limit)
        self._leases.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Give a lease back. All its rows must have been released."""
        if lease.held:
            raise PoolExhausted(f"a lease that still holds {lease.held} rows cannot end")
        self._leases.discard(lease)

    def allocate(self, count: int, lease: Lease) -> Ids:
        """``count`` row ids, int32, each with one reference; :class:`PoolExhausted` beyond the lease."""
        self._charge(lease, count)
        start = self._free_count - count
        ids: Ids = self._free[start : self._free_count][::-1].copy()
        self._free_count = start
        self._references[ids] = 1
        return ids

    def retain(self, ids: Ids, lease: Lease) -> None:
        """Add a reference to rows that another lease holds; they count against both."""
        if not np.all(self._references[ids] > 0):
            raise PoolExhausted("a row that was freed cannot be shared")
        self._charge(lease, len(ids))
        self._references[ids] += 1

    def release(self, ids: Ids, lease: Lease) -> None:
        """Drop one reference to each row; rows that nobody holds any more are free at once."""
        if not np.all(self._references[ids] > 0):
            raise PoolExhausted("a row was freed twice")
        lease.held -= len(ids)
        self._references[ids] -= 1
        freed = ids[self._references[ids] == 0]
        self._free[self._free_count : self._free_count + len(freed)] = freed[::-1]
        self._free_count += len(freed)

    def _charge(self, lease: Lease, count: int) -> None:
        if lease not in self._leases:
            raise PoolExhausted("the lease has ended")
        if lease.held + count > lease.limit:
            raise PoolExhausted(f"{lease.held} + {count} rows exceed a lease of {lease.limit}")
        lease.held += count
        lease.peak = max(lease.peak, lease.held)

    def rebuild(self, owners: Iterable[SequenceRows]) -> None:
        """Make the books anew from what ``owners`` hold; every other row and lease is given up.

        An interrupt may fall between two lines of any method here. After it nobody's half-done change counts: the
        only truth is who is still there.
        """
        owners = list(owners)
        self._references[:] = 0
        for owner in owners:
            ids = np.concatenate([_EMPTY, *(layer.all_ids() for layer in owner.layers)])
            self._references[ids] += 1
            owner.lease.held = len(ids)
        free = np.flatnonzero(self._references == 0)[::-1]
        self._free[: len(free)] = free
        self._free_count = len(free)
        self._leases = {owner.lease for owner in owners}

    def check_integrity(self, owners: Iterable[SequenceRows]) -> None:
        """Assert that every row is free or held, as often as it is counted, and in one tier of its owner."""
        owners = list(owners)
        holders: Counter[int] = Counter()
        for owner in owners:
            ids = np.concatenate([_EMPTY, *(layer.all_ids() for layer in owner.layers)])
            assert len(np.unique(ids)) == len(ids), "a row stands twice in one owner"
            assert owner.lease.held == len(ids), "a lease counts other rows than its owner holds"
            holders.update(ids.tolist())
        counted = {int(row): int(self._references[row]) for row in np.flatnonzero(self._references)}
        assert counted == dict(holders), "reference counts and holders differ"
        free = self._free[: self._free_count]
        assert len(np.unique(free)) == len(free), "a row is free twice"
        assert not np.any(self._references[free]), "a held row is on the free list"
        assert len(free) + len(counted) == self.capacity, "rows were lost"
        assert self.rows_unreserved >= 0, "more was promised than there is"


@dataclass
class LayerRows:
    """One sequence's rows in one layer, each list ascending by position (int32).

    Tiers: text (``text_ids``), core (``image_ids[core]``), secondary (``image_ids[~core]``).
    ``freed`` counts the rows that this layer gave up or never stored.
    """

    text_positions: Ids = field(default_factory=lambda: _EMPTY)
    text_ids: Ids = field(default_factory=lambda: _EMPTY)
    image_positions: Ids = field(default_factory=lambda: _EMPTY)
    image_ids: Ids = field(default_factory=lambda: _EMPTY)
    core: Mask = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    freed: int = 0

    def all_ids(self) -> Ids:
        return np.concatenate([self.image_ids, self.text_ids])

    def ids_to_read(self, secondary: bool) -> Ids:
        """Image rows (the core alone, or all stored ones), then text rows: what a step attends."""
        image = self.image_ids if secondary else self.image_ids[self.core]
        return np.concatenate([image, self.text_ids])

    def counts(self) -> dict[str, int]:
        core = int(self.core.sum())
        return {
            "text": len(self.text_ids),
            "core": core,
            "secondary": len(self.image_ids) - core,
            "freed": self.freed,
        }


class SequenceRows:
    """All rows of one sequence, layer by layer, drawn from ``pool`` under one lease."""

    def __init__(self, pool: RowPool, layers: int, limit: int) -> None:
        self.pool = pool
        self.lease = pool.lease(limit)
        self.layers = [LayerRows() for _ in range(layers)]

    def fill(self, layer: int, text: Ids, image: Ids, core: Mask, freed: int) -> tuple[Ids, Ids]:
        """Take rows for the prompt's ``text`` and ``image`` positions of one layer; the ids for both."""
        ids = self.pool.allocate(len(text) + len(image), self.lease)
        text_ids, image_ids = ids[: len(text)], ids[len(text) :]
        self.layers[layer] = LayerRows(text, text_ids, image, image_ids, core, freed)
        return text_ids, image_ids

    def append(self, position: int) -> Ids:
        """One new text row in every layer, for the token at ``position``: an id per layer."""
        ids = self.pool.allocate(len(self.layers), self.lease)
        for rows, row in zip(self.layers, ids, strict=True):
            rows.text_positions = np.append(rows.text_positions, np.int32(position))
            rows.text_ids = np.append(rows.text_ids, row)
        return ids

    def set_core(self, layer: int, core: Mask) -> None:
        """Move image rows between core and secondary; ``core`` is a mask over the stored image rows."""
        assert core.shape == self.layers[layer].core.shape
        self.layers[layer].core = core

    def keep_text(self, layer: int, keep: Mask) -> None:
        """Free the text rows that ``keep``, a mask over this layer's text rows, leaves out."""
        rows = self.layers[layer]
        self.pool.release(rows.text_ids[~keep], self.lease)
        rows.freed += int((~keep).sum())
        rows.text_positions = rows.text_positions[keep]
        rows.text_ids = rows.text_ids[keep]

    def keep_image(self, layer: int, keep: Mask) -> None:
        """Free the image rows that ``keep``, a mask over this layer's image rows, leaves out, of any tier."""
        rows = self.layers[layer]
        self.pool.release(rows.image_ids[~keep], self.lease)
        rows.freed += int((~keep).sum())
        rows.image_positions = rows.image_positions[keep]
        rows.image_ids = rows.image_ids[keep]
        rows.core = rows.core[keep]

    def fork(self, limit: int) -> SequenceRows:
        """A second owner of the same rows, with a core set and later text of its own."""
        other = SequenceRows(self.pool, len(self.layers), limit)
        for layer, rows in enumerate(self.layers):
            self.pool.retain(rows.all_ids(), other.lease)
            other.layers[layer] = LayerRows(
                rows.text_positions, rows.text_ids, rows.image_positions, rows.image_ids, rows.core.copy(), rows.freed
            )
        return other

    def close(self) -> None:
        """Free every row and end the lease. Closing twice is safe and does nothing."""
        for rows in self.layers:
            self.pool.release(rows.all_ids(), self.lease)
        self.layers = [LayerRows() for _ in self.layers]
        self.pool.end(self.lease)

    def __iter__(self) -> Iterator[LayerRows]:
        return iter(self.layers)
