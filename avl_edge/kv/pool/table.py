"""The rows of a sequence in all layers, as one table: what policies change and what steps read."""

from __future__ import annotations

import numpy as np

from ..books import Books, Columns, Gone, Ids, Mask

_SMALLEST = 64


class RowTable:
    """Rows of all layers, those of each ascending by position.

    ``ids`` and ``positions`` int32 ``[L, capacity]``, of which the first ``counts`` int32 ``[L]`` count; what stands
    behind them is void. Changed in place: who wants to keep a list copies it. ``width``: the most rows of a layer;
    ``total``: the rows of all layers.
    """

    def __init__(self, layers: int) -> None:
        self.counts: Ids = np.zeros(layers, dtype=np.int32)
        self.ids: Ids = np.empty((layers, 0), dtype=np.int32)
        self.positions: Ids = np.empty((layers, 0), dtype=np.int32)
        self.width = self.total = 0
        self._layers = np.arange(layers)

    @classmethod
    def of(cls, ids: Ids, positions: Ids) -> RowTable:
        """As many rows in each layer: ``[L, n]`` each."""
        table = cls(len(ids))
        for layer in range(len(ids)):
            table.put(layer, positions[layer], ids[layer])
        return table

    @property
    def columns(self) -> Columns:
        return Columns(self.ids, self.positions, self.counts)

    def put(self, layer: int, positions: Ids, ids: Ids) -> None:
        """Make these the rows of a layer."""
        self._reserve(len(ids))
        self.positions[layer, : len(ids)], self.ids[layer, : len(ids)] = positions, ids
        self.counts[layer] = len(ids)
        self.recount()

    def append(self, position: int, ids: Ids) -> None:
        """One more row in every layer, ``[L]``."""
        self._reserve(self.width + 1)
        self.positions[self._layers, self.counts] = position
        self.ids[self._layers, self.counts] = ids
        self.counts += 1
        self.width += 1
        self.total += len(ids)

    def keep(self, keep: Mask, books: Books, first: int = 0) -> Gone:
        """Keep the rows in ``keep`` ``[k, width]`` of the k layers from ``first`` on; the others."""
        gone = books.compress(self.columns.of(slice(first, first + len(keep))), self.covering(keep, first))
        self.recount()
        return gone

    def covering(self, mask: Mask, first: int = 0) -> Mask:
        """A mask ``[k, width]`` over the rows of the k layers from ``first`` on, as the books take it; ValueError where
        it is none."""
        counts = self.counts[first : first + len(mask)]
        if mask.dtype != np.bool_ or len(counts) < len(mask) or mask.shape[1] < counts.max(initial=0):
            kind = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"{kind} is no mask over up to {self.width} rows of {len(self.counts) - first} layers")
        return np.ascontiguousarray(mask)

    def recount(self) -> None:
        """Sum up what the counts of the layers are now."""
        self.width, self.total = int(self.counts.max(initial=0)), int(self.counts.sum())

    def _reserve(self, rows: int) -> None:
        capacity = self.ids.shape[1]
        if rows > capacity:
            self._widen(max(rows, capacity + capacity // 2, _SMALLEST) - capacity)

    def _widen(self, more: int) -> None:
        self.ids, self.positions = (np.pad(each, ((0, 0), (0, more))) for each in (self.ids, self.positions))


class TieredTable(RowTable):
    """Rows in two tiers: ``core`` bool ``[L, capacity]``, False where there is no row, and ``core_counts`` int32
    ``[L]``, of which ``core_width`` is the largest and ``core_total`` the sum."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.core: Mask = np.zeros((layers, 0), dtype=np.bool_)
        self.core_counts: Ids = np.zeros(layers, dtype=np.int32)
        self.core_width = self.core_total = 0

    @property
    def columns(self) -> Columns:
        return Columns(self.ids, self.positions, self.counts, self.core, self.core_counts)

    def put_tiered(self, layer: int, positions: Ids, ids: Ids, core: Mask) -> None:
        """Make these the rows of a layer, those in ``core`` its core."""
        self.put(layer, positions, ids)
        self.core[layer] = False
        self.core[layer, : len(core)] = core
        self.core_counts[layer] = np.count_nonzero(core)
        self.recount()

    def set_core(self, core: Mask, books: Books, first: int = 0) -> None:
        """Make ``core`` ``[k, width]`` the core of the k layers from ``first`` on."""
        books.set_core(self.columns.of(slice(first, first + len(core))), self.covering(core, first))
        self.recount()

    def recount(self) -> None:
        super().recount()
        self.core_width, self.core_total = int(self.core_counts.max(initial=0)), int(self.core_counts.sum())

    def _widen(self, more: int) -> None:
        super()._widen(more)
        self.core = np.pad(self.core, ((0, 0), (0, more)))
