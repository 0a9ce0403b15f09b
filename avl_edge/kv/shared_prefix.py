"""Rows that several questions read: a shared prefix's cache, and the caches of the questions about it.

A shared prefix is a prompt that ends with its last image. What stands there does not depend on what is asked after it,
since a token attends only those before it; so its rows are computed and stored once, and a question brings its own text
alone. Which image rows are stored is decided before anything is asked: all, or those whose values stand out. Each
question has a core of its own among them, picked by its own attention. A row is core for one question and secondary for
another, so both tiers have one format.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..request import ImageSpan, RopePositions
from .books import Ids, Index
from .budget import KvPlan
from .cache import NO_SCORES, Scores, SequenceCache
from .methods import Method
from .pool import BorrowingRows, RowPool
from .pool.sequence import LayerRows
from .selection import Selected

QUESTION_TOKENS = 1024
"""Those of a question and its answer, for which the keys of a prefix are smoothed; more may come."""


class SharedPrefixCache(SequenceCache):
    """The rows of a shared prefix. ``plan`` is of a method that asks for no attention.

    ``totals``, layer by layer: the attention ``[length]`` that tokens received from the text between two images. It is
    part of the sums of every question, and nobody runs those queries again.
    """

    def __init__(
        self,
        pool: RowPool,
        plan: KvPlan[Method],
        length: int,
        spans: Sequence[ImageSpan],
        layers: int,
        rope: RopePositions | None = None,
    ) -> None:
        super().__init__(pool, plan, length, spans, layers, rope=rope)
        self.totals: list[Scores] = []

    @property
    def reach(self) -> int:
        return self.length + self.rope_delta + QUESTION_TOKENS

    def prompt_queries(self, layer: int) -> Index | None:
        queries = np.flatnonzero(self._is_suffix(layer))
        return queries if len(queries) else None

    def store_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = NO_SCORES) -> list[Selected]:
        self.totals.append(total)
        return super().store_prompt(layer, last, total, distances)

    def stored(self, layer: int) -> Ids:
        """The positions of the rows of a layer: int32, ascending."""
        rows = self.rows.layers[layer]
        return np.sort(np.concatenate([rows.image_positions, rows.text_positions]))

    def every_row(self, layer: int) -> list[Selected]:
        """The rows of a layer, format by format, at the ``order`` of their tokens."""
        rows = self.rows.layers[layer]
        order = np.searchsorted(self.stored(layer), np.concatenate([rows.image_positions, rows.text_positions]))
        return self._every_row(rows, order)


class QuestionCache(SequenceCache):
    """The rows of a question: those of its ``shared``, and its own text's.

    The policy is asked as for any prompt, over the tokens that the prefix stored in a layer and the question's own:
    what it sees are the scores that it would see if the prompt had been run over the rows that are stored. ``plan``
    counts what the question adds (:func:`~avl_edge.kv.budget.plan_after`).
    """

    def __init__(
        self,
        shared: SharedPrefixCache,
        plan: KvPlan[Method],
        length: int,
        spans: Sequence[ImageSpan],
        rope: RopePositions | None = None,
    ) -> None:
        rows = BorrowingRows(shared.rows, shared.length, plan.pages)
        super().__init__(shared.rows.pool, plan, length, spans, len(rows.layers), rows, rope)
        self.begin = shared.length
        self._shared = shared

    def prompt_queries(self, layer: int) -> Index | None:
        queries = super().prompt_queries(layer)
        return None if queries is None else queries[queries >= len(self._shared.stored(layer))]

    def positions(self, layer: int) -> Ids:
        return np.concatenate([self._shared.stored(layer), self._positions[self.begin :]])

    def store_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = NO_SCORES) -> list[Selected]:
        total, before = total.copy(), self._shared.stored(layer)
        total[: len(before)] += self._shared.totals[layer][before]
        return super().store_prompt(layer, last, total, distances)

    def _to_write(self, rows: LayerRows, order: Index) -> list[Selected]:
        own = rows.text_positions >= self.begin
        order = order[len(rows.image_ids) :][own]
        return [Selected(self.formats.text, order, rows.text_ids[own], rows.text_positions[own])]

    def rows_before(self, layer: int) -> list[Selected]:
        return self._shared.every_row(layer)
