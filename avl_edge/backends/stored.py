"""A cache's rows in a store: what is written where in prefill and decode, what moves, and what attention gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..attention import lowrank
from ..attention.kernels import Part, value_distances
from ..attention.lowrank import LowRankRows
from ..config import Formats
from ..kv.cache import SequenceCache
from ..kv.layout import Format
from ..kv.pool import Moved, RowPool
from ..kv.pool.compaction import Demotion, compact
from ..kv.selection import ListedRows, Selected, is_low_rank
from ..kv.smoothing import Angles, Fit, Smoothing
from ..kv.store import RowStore

BYTES_AT_ONCE = 2**24
"""Bytes of rows in the model's dtype that are converted together; a layer's are, however many."""
CONVERSION_COPIES = 3
"""Times so many bytes are taken meanwhile."""


class StoredRows:
    """The rows of all sequences in one store. ``angles`` gives RoPE's cosines and sines for positions,
    ``[n]`` or ``[axes, n]``."""

    def __init__(self, store: RowStore, angles: Angles, fit: Fit = Smoothing.fit) -> None:
        """``fit`` makes the smoothing of a prompt's keys."""
        self._store, self._angles, self._fit = store, angles, fit
        self._low_rank = LowRankRows(store, angles)

    def new_pool(self) -> RowPool:
        """A pool that owns all rows, none of them taken."""
        return RowPool(self._store.pages, self._store.shape)

    @property
    def store(self) -> RowStore:
        """The tensors in which they lie."""
        return self._store

    def store_prompt(
        self, cache: SequenceCache, layer: int, stored: Sequence[Selected], keys: Tensor, values: Tensor
    ) -> None:
        """Write what a layer stores of its prompt's ``keys`` and ``values``, each ``[m, H_kv, d]``.

        The keys are smoothed by what all of them are like, stored or not. A low-rank basis is fitted to all image rows
        that are stored, since any of them may come to need it.
        """
        if not cache.begin and cache.rows.smoothing[layer] >= 0:
            self._begin_smoothing(cache, layer, keys, cache.positions(layer))
        ranks = [Format(each.format).basis_rows for each in stored if is_low_rank(each)]
        if ranks:
            order, positions = cache.stored_images(stored)
            basis, chosen = self._store.index(cache.rows.take_basis(layer, ranks[0])), self._store.index(order)
            coordinates = self._store.index(cache.coordinates(positions))
            self._low_rank.begin(basis, keys[chosen], values[chosen], coordinates)
        smoothing = self._smoothing(cache, layer)
        for each in stored:
            chosen = self._store.index(each.order)
            own = keys[chosen] if smoothing is None else smoothing.keys(keys[chosen])
            self._write(cache, layer, each.format, each.ids, each.positions, own, values[chosen])

    def _begin_smoothing(
        self, cache: SequenceCache, layer: int, keys: Tensor, positions: npt.NDArray[np.int32]
    ) -> Smoothing:
        """Fit a layer's smoothing to ``keys`` ``[m, H_kv, d]`` at ``positions`` ``[m]``, and keep it in the row that
        the cache has for it."""
        coordinates = self._store.index(cache.coordinates(positions))
        smoothing = self._fit(keys, coordinates, cache.reach, self._angles)
        ids = self._store.index(cache.rows.smoothing[layer : layer + 1])
        self._store.write(ids, smoothing.center[None], smoothing.scale[None])
        return smoothing

    def _smoothing(self, cache: SequenceCache, layer: int) -> Smoothing | None:
        """That of the keys that are stored in a layer; None where they are as the model made them."""
        ids = cache.rows.smoothing[layer : layer + 1]
        if ids[0] < 0:
            return None
        center, scale = self._store.read(self._store.index(ids))
        return Smoothing(center[0], scale[0])

    def smoothings(self, caches: Sequence[SequenceCache]) -> list[Smoothing] | None:
        """Those of the keys of a batch, layer by layer, each ``[B, H_kv, d]``; None where no keys are smoothed."""
        ids = np.stack([cache.rows.smoothing for cache in caches], axis=1)
        if (ids < 0).all():
            return None
        has_none = torch.from_numpy(ids < 0)[..., None, None]
        center, scale = self._store.read(self._store.index(np.maximum(ids, 0).flatten()))
        size = (*ids.shape, *center.shape[1:])
        center, scale = center.view(size).masked_fill(has_none, 0), scale.view(size).masked_fill(has_none, 1)
        return [Smoothing(*pair) for pair in zip(center, scale, strict=True)]

    def after(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A prompt's ``keys`` and ``values`` ``[m, H_kv, d]`` behind those of the tokens before its cache's ``begin``,
        as many as the layer has, read from their rows."""
        before, smoothing = cache.rows_before(layer), self._smoothing(cache, layer)
        count = sum(len(each.ids) for each in before)
        every = [new.new_empty(count + len(new), *new.shape[1:]) for new in (keys, values)]
        for each in before:
            order = self._store.index(each.order)
            held, every[1][order] = self._store.read(self._store.index(each.ids), each.format)
            every[0][order] = held if smoothing is None else smoothing.original(held)
        for rows, new in zip(every, (keys, values), strict=True):
            rows[count:] = new
        return every[0], every[1]

    def append(self, caches: Sequence[SequenceCache], ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Write one new text row for each sequence, each in its own format: ``[B, H_kv, d]``, ``keys`` as they are to
        be stored."""
        names = [cache.formats.text for cache in caches]
        for name in dict.fromkeys(names):
            at = [number for number, other in enumerate(names) if other == name]
            rows = (keys, values) if len(at) == len(names) else (keys[at], values[at])
            self._store.write(torch.tensor([int(ids[number]) for number in at]), *rows, name)

    def parts(self, lists: ListedRows) -> list[Part]:
        """What a batch reads in the layer of ``lists``, format by format; none of it low-rank."""
        return [
            Part(name, *self._store.arenas(name), torch.from_numpy(rows), torch.from_numpy(offsets))
            for name, rows, offsets in lists.parts()
        ]

    def attend(
        self, cache: SequenceCache, layer: int, read: Sequence[Selected], query: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """One query ``[H, d]``, as it meets stored keys, over rows of any formats: what
        :func:`avl_edge.attention.lowrank.attend` gives for them."""
        basis, *every = self._store.indices([cache.rows.layers[layer].basis, *(each.ids for each in read)])
        smoothing = self._smoothing(cache, layer)
        rows = []
        for each, ids in zip(read, every, strict=True):
            if is_low_rank(each):
                rows.append(self._read_low_rank(cache, each, ids, basis, smoothing))
            else:
                rows.append(lowrank.Rows(*self._store.read(ids, each.format)))
        return lowrank.attend(query, rows, scale)

    def _read_low_rank(
        self, cache: SequenceCache, read: Selected, ids: Tensor, basis: Tensor, smoothing: Smoothing | None
    ) -> lowrank.Rows:
        coordinates = self._store.index(cache.coordinates(read.positions))
        rows = self._low_rank.read(Format(read.format), ids, basis, coordinates)
        return rows if smoothing is None else replace(rows, keys=smoothing.keys(rows.keys))

    def move(self, cache: SequenceCache, moved: Sequence[Moved]) -> None:
        """Convert rows that changed their format, those that :meth:`SequenceCache.settle` gave: of as many layers
        together as may be, since for a GPU every operator is a launch."""
        if not moved:
            return
        counts = sum(np.diff(each.ends, prepend=0) for each in moved)
        first, waiting = 0, 0
        for last, count in enumerate(np.asarray(counts).tolist(), 1):
            waiting += count
            if last == len(cache.rows.layers) or waiting * 2 * self._store.keys[0].nbytes >= BYTES_AT_ONCE:
                self._convert(cache, [each.of(first, last) for each in moved], first)
                first, waiting = last, 0

    def _convert(self, cache: SequenceCache, moved: Sequence[Moved], first: int) -> None:
        """Convert rows of the layers from ``first`` on."""
        together = [group for each in moved for group in _groups(each, first) if len(group[1].before)]
        # All are read before any is written: what one left may be where another goes.
        rows = [self._dense(cache, layer, each) for layer, each in together]
        for (layer, each), (keys, values) in zip(together, rows, strict=True):
            self._write(cache, layer, each.new_format, each.after, each.positions, keys, values)

    def demote(self, cache: SequenceCache, formats: Formats) -> bool:
        """Store image rows anew in the smaller ``formats`` (see :func:`avl_edge.kv.pool.compaction.smaller_formats`).

        As few layers as possible are in between at a time. False, and nothing changed, where the lease does not even
        have the room for that.
        """
        self.compact(cache)
        change = Demotion(cache.rows, formats)
        batches = change.batches()
        for batch in batches or ():
            smooths = [layer for layer in batch if change.smooths(layer)]
            moved = [(layer, change.rows_of(layer)) for layer in batch]
            rows = [self._dense(cache, layer, each) for layer, each in moved]
            for layer in batch:
                change.leave(layer)
            self._carry(change.compact())
            for (layer, each), (keys, values) in zip(moved, rows, strict=True):
                own = self._smooth(cache, layer, each.positions, keys) if layer in smooths else keys
                self._write(cache, layer, change.new, change.enter(layer), each.positions, own, values)
        if batches is not None:
            change.finish()
            cache.formats = formats
            self.compact(cache)
        return batches is not None

    def _smooth(self, cache: SequenceCache, layer: int, moved: npt.NDArray[np.int32], keys: Tensor) -> Tensor:
        """Smooth the keys of a layer that has none packed yet: ``keys`` ``[n, H_kv, d]`` of the image rows at positions
        ``moved``, which are returned, and where they are those of the other exact rows."""
        rows = cache.rows.layers[layer]
        stay = ~np.isin(rows.image_positions, moved) & Format(cache.formats.core).is_exact
        ids = self._store.index(np.concatenate([rows.image_ids[stay], rows.text_ids]))
        others, values = self._store.read(ids)
        positions = np.concatenate([moved, rows.image_positions[stay], rows.text_positions])
        cache.rows.take_smoothing(layer)
        smoothing = self._begin_smoothing(cache, layer, torch.cat([keys, others]), positions)
        self._store.write(ids, smoothing.keys(others), values)
        return smoothing.keys(keys)

    def compact(self, cache: SequenceCache) -> None:
        """Move a cache's rows into as few pages of the pool as hold them."""
        self._carry(compact(cache.rows))

    def _carry(self, moves: Iterable[tuple[str, npt.NDArray[np.int32], npt.NDArray[np.int32]]]) -> None:
        for name, before, after in moves:
            self._store.copy(self._store.index(before), self._store.index(after), name)

    def give_back(self, pages: npt.NDArray[np.int64]) -> int:
        """Hand the memory of the pool's free ``pages`` back to the operating system; how many bytes went."""
        return self._store.give_back(pages)

    def _dense(self, cache: SequenceCache, layer: int, moved: Moved) -> tuple[Tensor, Tensor]:
        form, ids = Format(moved.old_format), self._store.index(moved.before)
        if form.rank is None:
            return self._store.read(ids, form.name)
        basis, smoothing = self._store.index(cache.rows.layers[layer].basis), self._smoothing(cache, layer)
        coordinates = self._store.index(cache.coordinates(moved.positions))
        keys, values = self._low_rank.dense(form, ids, basis, coordinates)
        return keys if smoothing is None else smoothing.keys(keys), values

    def _write(
        self,
        cache: SequenceCache,
        layer: int,
        name: str,
        ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        keys: Tensor,
        values: Tensor,
    ) -> None:
        if Format(name).rank is None:
            self._store.write(self._store.index(ids), keys, values, name)
            return
        basis, smoothing = self._store.index(cache.rows.layers[layer].basis), self._smoothing(cache, layer)
        keys = keys if smoothing is None else smoothing.original(keys)
        coordinates = self._store.index(cache.coordinates(positions))
        self._low_rank.write(Format(name), self._store.index(ids), basis, keys, values, coordinates)


def _groups(moved: Moved, first: int) -> list[tuple[int, Moved]]:
    """Rows of the layers from ``first`` on that are converted together: all of them, but low-rank rows, which have a
    basis for each layer."""
    if all(Format(name).rank is None for name in (moved.old_format, moved.new_format)):
        return [(first, moved)]
    return [(first + layer, moved.of(layer, layer + 1)) for layer in range(len(moved.ends))]


def distances(values: Tensor, cache: SequenceCache, layer: int) -> npt.NDArray[np.floating]:
    """Those of a layer's ``values`` ``[m, H_kv, d]``, on the host (see :class:`~avl_edge.kv.methods.PromptLayer`):
    empty where the policy does not want them, zero where there is no image."""
    if not cache.wants_distances:
        return np.empty(0)
    is_image = cache.is_image(layer)
    if not is_image.any():
        return np.zeros(len(values))
    return value_distances(values, torch.from_numpy(is_image).to(values.device)).cpu().numpy()
