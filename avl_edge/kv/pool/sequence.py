"""One sequence's rows, layer by layer, in tiers. Moves no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...config import Formats
from .rows import Ids, RowPool

Mask = npt.NDArray[np.bool_]

_EMPTY = np.empty(0, dtype=np.int32)


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
    """All rows of one sequence, layer by layer, drawn from ``pool`` under one lease of ``limit`` pages.

    ``borrows``: image rows are another's, and can be neither moved nor given up.
    """

    borrows = False

    def __init__(self, pool: RowPool, layers: int, limit: int, formats: Formats | None = None) -> None:
        self.pool = pool
        self.formats = (formats or Formats()).stored
        self.lease = pool.lease(limit)
        self.layers = [LayerRows() for _ in range(layers)]
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

    def _own_text(self, rows: LayerRows) -> Mask:
        """Which text rows of a layer this sequence's lease counts."""
        return np.ones(len(rows.text_ids), dtype=np.bool_)

    @property
    def bytes_borrowed(self) -> int:
        """What those rows weigh that are read here and that another lease counts."""
        return 0

    def append(self, position: int) -> Ids:
        """One new text row in every layer, for the token at ``position``: an id per layer."""
        ids = self._allocate(len(self.layers), self.formats.text)
        positions = np.array([position], dtype=np.int32)
        for layer, rows in enumerate(self.layers):
            rows.text_positions = np.concatenate((rows.text_positions, positions))
            rows.text_ids = np.concatenate((rows.text_ids, ids[layer : layer + 1]))
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
        self.pool.release(rows.text_ids[~keep & self._own_text(rows)], self.lease, self.formats.text)
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
        for format_, ids in self.held():
            self.pool.release(ids, self.lease, format_)
        self.layers = [LayerRows() for _ in self.layers]
        self._smoothing = np.full(len(self.layers), -1, dtype=np.int32)
        self.pool.end(self.lease)

    def __iter__(self) -> Iterator[LayerRows]:
        return iter(self.layers)
