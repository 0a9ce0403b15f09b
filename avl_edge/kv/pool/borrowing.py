"""The rows of a sequence that begins with another's: a question about a picture that is in the pool already."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...errors import PoolExhausted
from ..books import Ids, Mask
from .sequence import LayerRows, SequenceRows


class BorrowingRows(SequenceRows):
    """The rows of ``lender``, which holds those of the tokens before ``begin``, images among them, and text rows after
    them under a lease of ``limit`` pages that counts these alone.

    A row that is borrowed is not counted again, neither by the pool nor by this lease: its lender's lease has set its
    page aside, and whoever lends stays until nobody borrows any more (:mod:`avl_edge.serving.scheduler` sees to that).
    What is a borrower's own is which rows are core, and which of the lent text it still reads.
    """

    borrows = True

    def __init__(self, lender: SequenceRows, begin: int, limit: int) -> None:
        super().__init__(lender.pool, len(lender.layers), limit, lender.formats)
        assert self.formats.core == self.formats.secondary, "a lent row has one form, whatever tier it is in"
        self._lender = lender
        self._begin = begin

    @property
    def bytes_borrowed(self) -> int:
        return self._lender.lease.nbytes

    @property
    def smoothing(self) -> Ids:
        return self._lender.smoothing

    def fill(self, layer: int, text: Ids, image: Ids, core: Mask, freed: int) -> LayerRows:
        """Borrow the image rows and the text rows before ``begin``, take rows for the other ``text`` positions."""
        lent = self._lender.layers[layer]
        if not np.array_equal(image, lent.image_positions):
            raise PoolExhausted("who borrows image rows keeps all of them")
        borrowed = lent.text_ids[np.isin(lent.text_positions, text)]
        own = self._allocate(len(text) - len(borrowed), self.formats.text)
        self.text.put(layer, text, np.concatenate([borrowed, own]))
        self.image.put_tiered(layer, image, lent.image_ids, core)
        self.freed[layer] = freed
        return self.layers[layer]

    def keep_image(self, keep: Mask, first: int = 0) -> None:
        kept = keep | (np.arange(keep.shape[1]) >= self.image.counts[first : first + len(keep), None])
        if not kept.all():
            raise PoolExhausted("borrowed rows are not this sequence's to free")

    def held(self) -> Iterator[tuple[str, Ids]]:
        for rows in self.layers:
            yield self.formats.text, self._own(rows.text_ids, rows.text_positions)

    def _own(self, ids: Ids, positions: Ids) -> Ids:
        own: Ids = ids[positions >= self._begin]
        return own
