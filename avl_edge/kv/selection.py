"""Selected rows: which tokens' rows of one format are meant, and where they lie; of one layer, or of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .books import Ids, Index, Run, books
from .layout import Format
from .methods.arithmetic import Scores
from .pool import RowTable, TieredTable


@dataclass(frozen=True, eq=False)
class Selected:
    """Rows of one format in one layer. ``order`` int64: where they stand among all that are meant (tokens, or rows to
    read); ``ids`` int32: where they lie in the pool; ``positions`` int32: those of their tokens.

    Two lists are equal where they are the same object.
    """

    format: str
    order: Index
    ids: Ids
    positions: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, order: Index) -> Selected:
        """The same rows at other indices."""
        return replace(self, order=order)


def is_low_rank(selected: Selected | Selection) -> bool:
    """Whether the rows are read over their layer's basis."""
    return Format(selected.format).rank is not None


def by_format(images: Sequence[Selected], text: Selected) -> list[Selected]:
    """Rows by formats: of one format, image rows before text rows. None without rows."""
    alike = [*(each for each in images if each.format == text.format), text]
    others = (each for each in images if each.format != text.format)
    columns = ("order", "ids", "positions")
    joined = Selected(text.format, *(np.concatenate([getattr(each, name) for each in alike]) for name in columns))
    return [each for each in (joined, *others) if len(each)]


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of one format in all layers, as they stand in their sequence's table now: all of them, or those of a
    ``tier``: True for the core, False for the others."""

    format: str
    table: RowTable
    tier: bool | None = None

    @property
    def counts(self) -> Ids:
        """How many of each layer, int32 ``[L]``."""
        if self.tier is None:
            return self.table.counts
        tiered = self._tiered()
        return tiered.core_counts if self.tier else tiered.counts - tiered.core_counts

    @property
    def total(self) -> int:
        """How many of all layers."""
        if self.tier is None:
            return self.table.total
        tiered = self._tiered()
        return tiered.core_total if self.tier else tiered.total - tiered.core_total

    @property
    def width(self) -> int:
        """The most of a layer."""
        if self.tier is None:
            return self.table.width
        return self._tiered().core_width if self.tier else int(self.counts.max(initial=0))

    def _tiered(self) -> TieredTable:
        assert isinstance(self.table, TieredTable), "text rows have no tiers"
        return self.table

    def places(self, layer: int) -> Index:
        """Where they stand in the table's layer."""
        if self.tier is None:
            return np.arange(self.table.counts[layer])
        tiered = self._tiered()
        return np.flatnonzero(tiered.core[layer, : tiered.counts[layer]] == self.tier)

    def of(self, layer: int) -> Selected:
        """Those of one layer, copied; ``order``: where they stand in the table."""
        places = self.places(layer)
        return Selected(self.format, places, self.table.ids[layer, places], self.table.positions[layer, places])

    def run(self, begins: Ids, layers: slice = slice(None), *, positions: bool = False) -> Run:
        """Their ids, or ``positions``, of some layers, from ``begins`` on in each."""
        column = (self.table.positions if positions else self.table.ids)[layers]
        core = None if self.tier is None else self._tiered().core[layers]
        return Run(begins, column, self.counts[layers], core, bool(self.tier))


Numbered = Sequence[tuple[int, Selection]]
"""Selections, each with the number of the list that it is in; several of one list stand in it in this order."""


def _runs(read: Numbered, offsets: Ids, layers: slice, *, positions: bool = False) -> list[Run]:
    """Selections as they stand in their lists, of which ``offsets[:, n]`` is where list ``n`` begins."""
    runs: list[Run] = []
    ends: dict[int, Ids] = {}
    for number, each in read:
        begins = ends[number] if number in ends else np.ascontiguousarray(offsets[:, number])
        runs.append(each.run(begins, layers, positions=positions))
        ends[number] = begins + runs[-1].counts
    return runs


def list_rows(read: Numbered, offsets: Ids, rows: Ids, layers: slice = slice(None), *, positions: bool = False) -> None:
    """Write the ids of some layers' rows, or their ``positions``, into ``rows`` ``[k, capacity]``: of list ``n`` from
    ``offsets[:, n]`` on, in the order of their positions."""
    books().gather(_runs(read, offsets, layers, positions=positions), rows)


class ListedRows:
    """What a batch reads in one ``layer``, as lists: format by format, those of the sequences one after the other."""

    def __init__(self, reads: Sequence[Sequence[Selection]], layer: int) -> None:
        """``reads``: image rows, then text rows, of each sequence."""
        batch, self._layers = len(reads), slice(layer, layer + 1)
        found = [[each for each in (read[-1], *read[:-1]) if each.counts[layer]] for read in reads]
        self.formats = list(dict.fromkeys(each.format for read in found for each in read))
        lists = {name: part * batch for part, name in enumerate(self.formats)}
        self.lists = [[lists.get(each.format, 0) + number for each in read] for number, read in enumerate(reads)]
        numbered = [pair for own, read in zip(self.lists, reads, strict=True) for pair in zip(own, read, strict=True)]
        lengths = np.zeros(max(1, len(lists)) * batch, dtype=np.int32)  # without any rows, a list to be empty in
        for number, each in numbered:
            lengths[number] += each.counts[layer]
        self.offsets: Ids = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)[None]
        self.rows: Ids = np.empty((1, int(self.offsets[0, -1])), dtype=np.int32)
        list_rows(numbered, self.offsets, self.rows, self._layers)

    def parts(self) -> Iterator[tuple[str, Ids, Ids]]:
        """Each format with its rows int32 ``[n]``, and where in these each sequence's begin and end, int32
        ``[batch + 1]``."""
        batch = len(self.lists)
        for part, name in enumerate(self.formats):
            offsets = self.offsets[0, part * batch : (part + 1) * batch + 1]
            yield name, self.rows[0, offsets[0] : offsets[-1]], offsets - offsets[0]

    def give(self, scores: StepScores, number: int, weights: Scores) -> None:
        """Give ``scores`` the layer's of the sequence with that number, of the ``weights`` ``[n]`` of all listed
        rows."""
        scores.give(self.lists[number], self.offsets, weights[None], self._layers)


class StepScores:
    """The attention that the rows which a sequence reads in a step received: ``image`` ``[L, n]`` and ``text``
    ``[L, m]``, a layer's in the order of their positions, zero behind its last row; ``image_counts`` and
    ``text_counts`` int32 ``[L]``. They are copied when they are first asked for, as most steps leave image rows as they
    are: until then the rows and what was given have to stay."""

    def __init__(self, read: Sequence[Selection], dtype: npt.DTypeLike) -> None:
        """``read``: image rows, of one format or of each tier's, then text rows."""
        self._read, self._dtype = read, dtype
        every = read[0] if len(read) == 2 else Selection(read[0].format, read[0].table)
        self.image_counts, self.text_counts = every.counts.copy(), read[-1].counts.copy()
        self._widths = every.width, read[-1].width
        self._given: list[tuple[Sequence[int], Ids, Scores, slice]] = []

    def give(self, lists: Sequence[int], offsets: Ids, scores: Scores, layers: slice = slice(None)) -> None:
        """Those of some layers are in ``scores`` ``[k, capacity]``, whose rows were listed by ``offsets`` in the lists
        with these numbers."""
        self._given.append((lists, offsets, scores.astype(self._dtype, copy=False), layers))

    @cached_property
    def image(self) -> Scores:
        return self._copy(slice(-1), self._widths[0])

    @cached_property
    def text(self) -> Scores:
        return self._copy(slice(-1, None), self._widths[1])

    def _copy(self, part: slice, width: int) -> Scores:
        found: Scores = np.zeros((len(self.text_counts), width), self._dtype)
        for lists, offsets, scores, layers in self._given:
            runs = _runs(list(zip(lists, self._read, strict=True)), offsets, layers)[part]
            books().scatter(runs, scores, found[layers])
        return found
