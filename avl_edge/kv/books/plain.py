"""The books in numpy: what the native library does, where it was not built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import PoolExhausted
from .base import (
    FREED_TWICE,
    Array,
    Columns,
    Gone,
    Ids,
    Index,
    Mask,
    Pages,
    Retiered,
    Run,
    Share,
    refusal,
)


class PlainBooks:
    """:class:`~avl_edge.kv.books.base.Books` in numpy, layer by layer where layers differ."""

    def take(self, pages: Pages, share: Share, count: int) -> Ids:
        share.reserve(count)
        missing = count - int(share.free_count[0])
        if missing > 0:
            self._take_pages(pages, share, -(-missing // share.packing.rows))
        end = int(share.free_count[0])
        ids: Ids = share.free[end - count : end][::-1].copy()
        share.free_count[0] = end - count
        at, slots = share.packing.places(ids)
        pages.taken[at, slots] = True
        np.add.at(pages.held, at, 1)
        counts = share.account.counts
        counts[1] += count * share.packing.row_bytes
        counts[2] = max(counts[2], counts[0])
        return ids

    @staticmethod
    def _take_pages(pages: Pages, share: Share, count: int) -> None:
        counts, pack, begin = share.account.counts, share.packing, int(pages.free_count[0]) - count
        if counts[0] + count > counts[3]:
            raise refusal(share.account, count)
        if begin < 0:
            raise PoolExhausted("no page is free")
        new = pages.free[begin : begin + count].astype(np.int64)
        pages.dirty[new], pages.held[new], pages.owner[new] = True, 0, share.account.number
        pages.packing[new] = share.number
        pages.taken[new] = False
        rows = pack.ids(new[:, None], np.arange(pack.rows - 1, -1, -1))
        held = int(share.free_count[0])
        # Under those that were free before, the lowest on top.
        share.free[rows.size : rows.size + held] = share.free[:held].copy()
        share.free[: rows.size] = rows.flatten()
        share.free_count[0] += rows.size
        pages.free_count[0] = begin
        counts[0] += count

    def release(self, pages: Pages, share: Share, ids: Ids) -> None:
        share.reserve(len(ids))
        at, slots = share.packing.places(ids)
        width = pages.taken.shape[1]
        owned = np.all(pages.owner[at] == share.account.number) and np.all(pages.taken[at, slots])
        if not owned or len(np.unique(at * width + slots)) < len(ids):
            raise PoolExhausted(FREED_TWICE)
        pages.taken[at, slots] = False
        np.subtract.at(pages.held, at, 1)
        held, counts = int(share.free_count[0]), share.account.counts
        free = np.concatenate([share.free[:held], ids])
        free = free[pages.held[share.packing.places(free)[0]] > 0]
        share.free[: len(free)] = free
        share.free_count[0] = len(free)
        left = np.unique(at[pages.held[at] == 0])[::-1]
        pages.leave(left)
        counts[0] -= len(left)
        counts[1] -= len(ids) * share.packing.row_bytes

    def retier(
        self, pages: Pages, core: Share, secondary: Share, columns: Columns, wanted: Mask
    ) -> tuple[Retiered, Retiered]:
        assert columns.core is not None
        assert columns.core_counts is not None
        shares = (core, secondary)
        found: tuple[list[tuple[Ids, Ids, Ids]], ...] = ([], [])
        for layer, count in enumerate(columns.counts.tolist()):
            was, now, ids = columns.core[layer, :count], wanted[layer, :count], columns.ids[layer]
            places = [np.flatnonzero(was & ~now), np.flatnonzero(~was & now)]
            before = [ids[where] for where in places]
            pairs = min(map(len, before))  # of rows that change places, which take each other's ids
            for share, old in zip(shares, before, strict=True):
                self.release(pages, share, old[pairs:])
            for way, where in enumerate(places):
                more = self.take(pages, shares[not way], len(where) - pairs)
                ids[where] = np.concatenate([before[not way][:pairs], more])
                found[way].append((columns.positions[layer, where], before[way], ids[where]))
            columns.core[layer, :count], columns.core_counts[layer] = now, np.count_nonzero(now)
        leaving, entering = map(_joined, found)
        return leaving, entering

    def set_core(self, columns: Columns, wanted: Mask) -> None:
        assert columns.core is not None
        assert columns.core_counts is not None
        for layer, count in enumerate(columns.counts.tolist()):
            columns.core[layer, :count] = wanted[layer, :count]
            columns.core_counts[layer] = np.count_nonzero(wanted[layer, :count])

    def compress(self, columns: Columns, keep: Mask) -> Gone:
        core = np.zeros(columns.ids.shape, dtype=np.bool_) if columns.core is None else columns.core
        gone = []
        for layer, count in enumerate(columns.counts.tolist()):
            mask = keep[layer, :count]
            kept = np.count_nonzero(mask)
            rows = [each[layer, :count] for each in (columns.ids, columns.positions, core)]
            gone.append([each[~mask] for each in rows])
            for each in rows:
                each[:kept] = each[mask]
            core[layer, kept:count] = False
            columns.counts[layer] = kept
            if columns.core_counts is not None:
                columns.core_counts[layer] = np.count_nonzero(core[layer, :kept])
        ids, positions, was_core = (np.concatenate(column) for column in zip(*gone, strict=True))
        return Gone(ids, positions, was_core)

    def gather(self, runs: Sequence[Run], rows: Ids) -> None:
        for layer in range(len(rows)):
            for run in runs:
                rows[layer, _listed(run, layer)] = run.column[layer, _standing(run, layer)]

    def scatter(self, runs: Sequence[Run], scores: Array, to: Array) -> None:
        for layer in range(len(scores)):
            for run in runs:
                at = slice(int(run.counts[layer])) if len(runs) == 1 else _standing(run, layer)
                to[layer, at] = scores[layer, _listed(run, layer)]

    def top(self, scores: Array, count: int) -> Mask:
        order = np.argsort(-scores, axis=1, kind="stable")
        mask = np.zeros(scores.shape, dtype=np.bool_)
        np.put_along_axis(mask, order[:, :count], True, axis=1)
        return mask


def _joined(layers: Sequence[tuple[Ids, Ids, Ids]]) -> Retiered:
    positions, before, after = (np.concatenate(column) for column in zip(*layers, strict=True))
    return Retiered(positions, before, after, np.cumsum([len(rows) for rows, *_ in layers], dtype=np.int64))


def _listed(run: Run, layer: int) -> slice:
    """Where a run's rows stand in its list."""
    return slice(int(run.begins[layer]), int(run.begins[layer] + run.counts[layer]))


def _standing(run: Run, layer: int) -> Index | slice:
    """Where a run's rows stand in their table."""
    count = int(run.counts[layer])
    return slice(count) if run.core is None else np.flatnonzero(run.core[layer] == run.tier)[:count]
