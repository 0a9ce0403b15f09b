"""A sequence's rows in less memory: image rows in a smaller format, and the rows of a format in as few pages as hold
them. Moves no bytes; who calls this carries them along.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...config import Formats, KvShape
from ...errors import BadInput
from ..books import Ids, Mask
from ..layout import check, smoothing_rows
from .sequence import Moved, SequenceRows

_SMALLER = {"exact": "int8", "int8": "int8/int4", "int8/int4": "int4"}

Names = dict[str, str | None]
"""A layer's formats by tier; None: the rows of that tier are between two formats."""


def smaller_formats(formats: Formats, one_tier: bool, shape: KvShape) -> Formats | None:
    """``formats`` with secondary rows one format smaller, or all image rows where they are of ``one_tier``.

    exact becomes int8, this int8/int4, and this int4. None: there is no smaller one, or none that these rows can take.
    """
    name = _SMALLER.get(formats.core if one_tier else formats.secondary)
    while name is not None:
        both = not one_tier or formats.secondary == formats.core
        changed = Formats(formats.text, name if one_tier else formats.core, name if both else formats.secondary)
        try:
            check(changed, shape)
            return changed
        except BadInput:
            name = _SMALLER.get(name)
    return None


def compact(rows: SequenceRows, names: list[Names] | None = None) -> Iterator[tuple[str, Ids, Ids]]:
    """Move rows into as few pages as hold them, format by format: the format, and the ids before and after.

    The bytes have to follow before the next format is asked for. ``names``: each layer's formats, where they are not
    those of the sequence.
    """
    names = names or [dict(rows.formats.by_tier())] * len(rows.layers)
    for format_ in rows.pool.pages_of(rows.lease):
        before, after = rows.pool.compact(rows.lease, format_)
        if len(before):
            for layer, of_layer in enumerate(names):
                _renumber(rows, layer, of_layer, format_, before, after)
            if format_ == "exact":
                rows.move_smoothing(_replaced(rows.smoothing, before, after))
            yield format_, before, after


def _renumber(rows: SequenceRows, layer: int, names: Names, format_: str, before: Ids, after: Ids) -> None:
    """Write new ids over those of ``before``, ascending; ids of other formats may be the same numbers."""
    own = rows.layers[layer]
    text, image = own.text_ids, own.image_ids
    if names["text"] == format_:
        rows.text.ids[layer, : len(text)] = _replaced(text, before, after)
    if format_ == "exact":
        own.basis = _replaced(own.basis, before, after)
    chosen = own.core & (names["core"] == format_) | ~own.core & (names["secondary"] == format_)
    if chosen.any():
        rows.image.ids[layer, : len(image)] = np.where(chosen, _replaced(image, before, after), image)


def _replaced(ids: Ids, before: Ids, after: Ids) -> Ids:
    at = np.minimum(np.searchsorted(before, ids), len(before) - 1)
    return np.where(before[at] == ids, after[at], ids)


class Demotion:
    """The image rows of a sequence on their way into a smaller format, some layers at a time.

    For each of :meth:`batches`, read the rows of all its layers (:meth:`rows_of`), :meth:`leave` them, :meth:`compact`
    the others, then :meth:`enter` layer by layer and write what was read. In between no lease limit is exceeded, since
    pages that were left are empty before new ones are taken. At the end :meth:`finish`.
    """

    def __init__(self, rows: SequenceRows, formats: Formats) -> None:
        """``formats`` as :func:`smaller_formats` gives them."""
        self._rows, self._formats = rows, formats.stored
        self._one_tier = self._formats.core != rows.formats.core
        self.old = rows.formats.core if self._one_tier else rows.formats.secondary
        self.new = self._formats.core if self._one_tier else self._formats.secondary
        self._names: list[Names] = [dict(rows.formats.by_tier()) for _ in rows.layers]

    def batches(self) -> list[list[int]] | None:
        """Layers whose rows change together, as few as the lease allows, and none without rows; None: it does not allow
        the change at all.

        Holds for a sequence whose rows stand in as few pages as hold them.
        """
        pool, lease = self._rows.pool, self._rows.lease
        pages = pool.pages_of(lease)
        counts = {name: pool.rows_in(of) for name, of in pages.items()}
        others = sum(len(of) for name, of in pages.items() if name not in (self.old, self.new))
        old, new = counts.get(self.old, 0), counts.get(self.new, 0)
        found: list[list[int]] = [[]]
        for layer in range(len(self._rows.layers)):
            count = int(self._mask(layer).sum())
            found[-1] += [layer] if count else []
            old, new = old - count + (self.smooths(layer) if count else 0), new + count
            needed = -(-old // pool.packing(self.old).rows) + -(-new // pool.packing(self.new).rows) + others
            if found[-1] and needed <= lease.limit:
                found.append([])
        return None if found[-1] else found[:-1]

    def smooths(self, layer: int) -> bool:
        """Whether the keys of a layer are smoothed by this change: its exact rows too, by one exact row more."""
        return self._rows.smoothing[layer] < 0 and smoothing_rows(self._formats) > 0

    def _mask(self, layer: int) -> Mask:
        core = self._rows.layers[layer].core
        return np.ones_like(core) if self._one_tier else ~core

    def rows_of(self, layer: int) -> Moved:
        """The rows of a layer that change, where they are now."""
        rows, mask = self._rows.layers[layer], self._mask(layer)
        ids = rows.image_ids[mask]
        return Moved(rows.image_positions[mask], ids, ids, self.old, self.new, np.array([len(ids)]))

    def leave(self, layer: int) -> None:
        """Give up the old places of a layer's rows; their bytes stand until another row is written."""
        self._rows.pool.release(self.rows_of(layer).before, self._rows.lease, self.old)
        self._rename(layer, None)

    def compact(self) -> Iterator[tuple[str, Ids, Ids]]:
        """:func:`compact` in the middle of the change."""
        return compact(self._rows, self._names)

    def enter(self, layer: int) -> Ids:
        """New places for a layer's rows, in the new format."""
        where = np.flatnonzero(self._mask(layer))
        ids = self._rows.pool.allocate(len(where), self._rows.lease, self.new)
        self._rows.image.ids[layer, where] = ids
        self._rename(layer, self.new)
        return ids

    def _rename(self, layer: int, name: str | None) -> None:
        self._names[layer] |= {"secondary": name} | ({"core": name} if self._one_tier else {})

    def finish(self) -> None:
        """All layers have changed."""
        self._rows.formats = self._formats
