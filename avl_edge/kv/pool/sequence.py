"""One sequence's rows, layer by layer, in tiers. Moves no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ...config import Formats
from ..books import Gone, Ids, Index, Mask, Retiered
from .rows import RowPool
from .table import RowTable, TieredTable

T = TypeVar("T", bound=np.generic)
_EMPTY = np.empty(0, dtype=np.int32)


class LayerRows:
    """One sequence's rows in one layer, each list ascending by position (int32), copied from the sequence's tables.

    Tiers: text (``text_ids``), core (``image_ids[core]``), secondary (``image_ids[~core]``); an id is one of its
    tier's format. ``freed`` counts the rows that this layer gave up or never stored; ``basis`` are exact rows beside
    them, which hold what a packed format needs to be read.
    """

    def __init__(self, text: RowTable, image: TieredTable, freed: Index, layer: int) -> None:
        self._text, self._image, self._freed, self._layer = text, image, freed, layer
        self.basis: Ids = _EMPTY

    @property
    def text_positions(self) -> Ids:
        return self._copy(self._text, self._text.positions)

    @property
    def text_ids(self) -> Ids:
        return self._copy(self._text, self._text.ids)

    @property
    def image_positions(self) -> Ids:
        return self._copy(self._image, self._image.positions)

    @property
    def image_ids(self) -> Ids:
        return self._copy(self._image, self._image.ids)

    @property
    def core(self) -> Mask:
        return self._copy(self._image, self._image.core)

    @property
    def freed(self) -> int:
        return int(self._freed[self._layer])

    def _copy(self, table: RowTable, column: npt.NDArray[T]) -> npt.NDArray[T]:
        copied: npt.NDArray[T] = column[self._layer, : table.counts[self._layer]].copy()
        return copied

    def counts(self) -> dict[str, int]:
        core = int(self._image.core_counts[self._layer])
        return {
            "text": int(self._text.counts[self._layer]),
            "core": core,
            "secondary": int(self._image.counts[self._layer]) - core,
            "freed": self.freed,
        }


@dataclass(frozen=True)
class Moved:
    """Image rows that change their format, layer by layer: positions, ids before and after, int32 ``[n]`` each, and the
    formats. ``ends`` int64 ``[L]``: how many up to the end of each layer."""

    positions: Ids
    before: Ids
    after: Ids
    old_format: str
    new_format: str
    ends: Index

    def of(self, first: int, last: int) -> Moved:
        """Those of the layers from ``first`` up to ``last``, which is not among them."""
        begin = int(self.ends[first - 1]) if first else 0
        rows = slice(begin, int(self.ends[last - 1]) if last else 0)
        return Moved(
            self.positions[rows],
            self.before[rows],
            self.after[rows],
            self.old_format,
            self.new_format,
            self.ends[first:last] - begin,
        )


class SequenceRows:
    """All rows of one sequence, drawn from ``pool`` under one lease of ``limit`` pages: tables ``text`` and ``image``
    of all layers, how many rows each of these ``freed``, and ``layers`` one by one.

    ``borrows``: image rows are another's, and can be neither moved nor given up.
    """

    borrows = False

    def __init__(self, pool: RowPool, layers: int, limit: int, formats: Formats | None = None) -> None:
        self.pool = pool
        self.formats = (formats or Formats()).stored
        self.lease = pool.lease(limit)
        self._empty(layers)

    def _empty(self, layers: int) -> None:
        self.text, self.image = RowTable(layers), TieredTable(layers)
        self.freed: Index = np.zeros(layers, dtype=np.int64)
        self.layers = [LayerRows(self.text, self.image, self.freed, layer) for layer in range(layers)]
        self._smoothing = np.full(layers, -1, dtype=np.int32)

    @property
    def smoothing(self) -> Ids:
        """The exact row of each layer that holds the smoothing of its keys, int32 ``[layers]``; -1 where there is
        none."""
        return self._smoothing

    def fill(self, layer: int, text: Ids, image: Ids, core: Mask, freed: int) -> LayerRows:
        """Take rows for the prompt's ``text`` and ``image`` positions of one layer."""
        text_ids = self._allocate(len(text), self.formats.text)
        image_ids = self._allocate_image(core)
        self.text.put(layer, text, text_ids)
        self.image.put_tiered(layer, image, image_ids, core)
        self.freed[layer] = freed
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

    def _own(self, ids: Ids, positions: Ids) -> Ids:  # noqa: ARG002
        """Those of the text rows that this sequence's lease counts."""
        return ids

    @property
    def bytes_borrowed(self) -> int:
        """What those rows weigh that are read here and that another lease counts."""
        return 0

    def append(self, position: int) -> Ids:
        """One new text row in every layer, for the token at ``position``: an id per layer."""
        ids = self._allocate(len(self.layers), self.formats.text)
        self.text.append(position, ids)
        return ids

    def set_core(self, core: Mask, first: int = 0) -> list[Moved]:
        """Move image rows of the k layers from ``first`` on between core and secondary; ``core`` ``[k, width]`` is a
        mask over the stored image rows.

        Where the tiers' formats differ, rows that change their tier get new ids; their bytes are still where the old
        ids say, and have to be read before anything is written to the new ones: layer by layer, or of neighbouring
        layers all of them before any is written. There ``core`` is of all layers.
        """
        formats, image = self.formats, self.image
        if formats.core == formats.secondary:
            image.set_core(core, self.pool.books, first)
            return []
        core = image.covering(core, first)
        if len(core) != len(self.layers):
            raise ValueError("rows of different formats change their tiers in all layers at once")
        both = self.pool.retier(self.lease, formats.core, formats.secondary, image.columns, core)
        image.recount()
        names = ((formats.core, formats.secondary), (formats.secondary, formats.core))
        return [_moved(rows, *of) for rows, of in zip(both, names, strict=True) if len(rows.before)]

    def keep_text(self, keep: Mask, first: int = 0) -> None:
        """Free the text rows of the k layers from ``first`` on that ``keep`` ``[k, width]``, a mask over them, leaves
        out."""
        gone = self._keep(self.text, keep, first)
        self.pool.release(self._own(gone.ids, gone.positions), self.lease, self.formats.text)

    def keep_image(self, keep: Mask, first: int = 0) -> None:
        """Free the image rows of the k layers from ``first`` on that ``keep`` ``[k, width]``, a mask over them, leaves
        out, of any tier."""
        gone = self._keep(self.image, keep, first)
        for tier, format_ in ((gone.core, self.formats.core), (~gone.core, self.formats.secondary)):
            self.pool.release(gone.ids[tier], self.lease, format_)

    def _keep(self, table: RowTable, keep: Mask, first: int) -> Gone:
        self.freed += table.counts
        gone = table.keep(keep, self.pool.books, first)
        self.freed -= table.counts
        return gone

    def take_basis(self, layer: int, count: int) -> Ids:
        """``count`` exact rows beside the tiers of a layer."""
        self.layers[layer].basis = self._allocate(count, "exact")
        return self.layers[layer].basis

    def take_smoothing(self, layer: int) -> Ids:
        """A row for the smoothing of a layer's keys, int32 ``[1]``."""
        ids = self._allocate(1, "exact")
        self._smoothing[layer] = ids[0]
        return ids

    def move_smoothing(self, moved: Ids) -> None:
        """The rows of :attr:`smoothing` lie elsewhere now."""
        self._smoothing = moved

    def held(self) -> Iterator[tuple[str, Ids]]:
        """All rows by format, a few at a time."""
        yield "exact", self._smoothing[self._smoothing >= 0]
        for rows in self.layers:
            yield self.formats.text, rows.text_ids
            yield self.formats.core, rows.image_ids[rows.core]
            yield self.formats.secondary, rows.image_ids[~rows.core]
            yield "exact", rows.basis

    def close(self) -> None:
        """Free every row and end the lease. Closing twice is safe and does nothing."""
        self.pool.release_all(self.lease)
        self._empty(len(self.layers))
        self.pool.end(self.lease)

    def __iter__(self) -> Iterator[LayerRows]:
        return iter(self.layers)


def _moved(rows: Retiered, old_format: str, new_format: str) -> Moved:
    return Moved(rows.positions, rows.before, rows.after, old_format, new_format, rows.ends)
