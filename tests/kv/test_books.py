"""The books in C++ and in numpy: the same numbers in the same arrays, and those of plain sets of Python."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avl_edge.config import Formats, KvShape
from avl_edge.errors import PoolExhausted
from avl_edge.kv.books import Books, NativeBooks, PlainBooks, Run
from avl_edge.kv.books.native import library
from avl_edge.kv.pool import RowPool, SequenceRows, TieredTable
from tests.equipment.row_bytes import row_bytes

LAYERS, PAGES = 3, 12
SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=2)
NAMES = ("exact", "int8", "int8/int4", "int4")

needs_library = pytest.mark.skipif(library() is None, reason="the books were not built")


def both() -> list[Books]:
    loaded = library()
    return [PlainBooks()] if loaded is None else [PlainBooks(), NativeBooks(loaded)]


def refused(made: list[SequenceRows], change: Callable[[SequenceRows], object]) -> bool:
    """Whether the leases had no room for a change, all of them or none."""
    found = set()
    for rows in made:
        try:
            change(rows)
            found.add(False)
        except PoolExhausted:
            found.add(True)
    (both_refuse,) = found
    return both_refuse


class BooksLife(RuleBasedStateMachine):
    """One life of some sequences under each implementation, and as sets: which positions each layer holds, in which
    tier. No two rows share a byte, and nobody holds more pages than were promised."""

    @initialize()
    def open(self) -> None:
        self.pools = [RowPool(PAGES, SHAPE, each) for each in both()]
        self.rows: list[list[SequenceRows]] = []
        self.model: list[list[dict[str, Any]]] = []
        self.random = np.random.default_rng(0)

    def _each(self, sequence: int) -> list[SequenceRows]:
        return self.rows[sequence % len(self.rows)]

    @precondition(lambda self: len(self.rows) < 3)
    @rule(
        text=st.lists(st.integers(0, 6), min_size=LAYERS, max_size=LAYERS),
        images=st.lists(st.integers(0, 20), min_size=LAYERS, max_size=LAYERS),
        names=st.tuples(*[st.sampled_from(NAMES)] * 3),
    )
    def begin(self, text: list[int], images: list[int], names: tuple[str, str, str]) -> None:
        made = [SequenceRows(pool, LAYERS, PAGES // 3, Formats(*names)) for pool in self.pools]
        model = []
        for layer in range(LAYERS):
            core = self.random.random(images[layer]) < 0.5
            places = np.arange(images[layer], dtype=np.int32), 50 + np.arange(text[layer], dtype=np.int32)
            if refused(made, lambda rows: rows.fill(layer, places[1], places[0], core, 0)):  # noqa: B023
                for rows in made:
                    rows.close()
                return
            model.append({"text": set(places[1].tolist()), "image": dict(enumerate(core.tolist()))})
        self.rows.append(made)
        self.model.append(model)

    @precondition(lambda self: bool(self.rows))
    @rule(sequence=st.integers(0, 99), position=st.integers(100, 10**6))
    def append(self, sequence: int, position: int) -> None:
        model = self.model[sequence % len(self.rows)]
        position = max([position, *(at + 1 for layer in model for at in layer["text"])])
        if self._refused(sequence, lambda rows: rows.append(position)):
            return
        for layer in model:
            layer["text"].add(position)

    def _refused(self, sequence: int, change: Callable[[SequenceRows], object]) -> bool:
        """Whether the lease had no room; the sequence ends then."""
        without_room = refused(self._each(sequence), change)
        if without_room:
            self.close(sequence)
        return without_room

    @precondition(lambda self: bool(self.rows))
    @rule(
        sequence=st.integers(0, 99), share=st.floats(0, 1), kind=st.sampled_from(["text", "image"]), first=st.booleans()
    )
    def keep(self, sequence: int, share: float, kind: str, first: bool) -> None:
        """In all layers, or in those from the second on."""
        begin = int(first)
        table = getattr(self._each(sequence)[0], kind)
        keep = self.random.random((LAYERS - begin, table.width)) < share
        for layer, mask in zip(self.model[sequence % len(self.rows)][begin:], keep, strict=True):
            gone = [at for at, kept in zip(sorted(layer[kind]), mask.tolist(), strict=False) if not kept]
            for at in gone:
                layer[kind].remove(at) if kind == "text" else layer[kind].pop(at)
        for rows in self._each(sequence):
            (rows.keep_text if kind == "text" else rows.keep_image)(keep, begin)

    @precondition(lambda self: bool(self.rows))
    @rule(sequence=st.integers(0, 99), share=st.floats(0, 1))
    def move(self, sequence: int, share: float) -> None:
        core = self.random.random((LAYERS, self._each(sequence)[0].image.width)) < share
        moved = [rows.set_core(core) for rows in self._each(sequence) if not self._too_full(rows)]
        if not moved:
            return
        for layer, mask in zip(self.model[sequence % len(self.rows)], core.tolist(), strict=True):
            layer["image"] = dict(zip(sorted(layer["image"]), mask, strict=False))
        for other in moved[1:]:
            for ours, theirs in zip(moved[0], other, strict=True):
                for name in ("positions", "before", "after", "ends"):
                    assert np.array_equal(getattr(ours, name), getattr(theirs, name))

    @staticmethod
    def _too_full(rows: SequenceRows) -> bool:
        """Whether a lease might not have the room: its pages, and as many as all image rows need in either format."""
        names = (rows.formats.core, rows.formats.secondary)
        more = sum(-(-rows.image.total // rows.pool.packing(name).rows) for name in names)
        return rows.lease.held + more > rows.lease.limit

    @precondition(lambda self: bool(self.rows))
    @rule(sequence=st.integers(0, 99))
    def close(self, sequence: int) -> None:
        self.model.pop(sequence % len(self.rows))
        for rows in self.rows.pop(sequence % len(self.rows)):
            rows.close()
            rows.close()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pools"):
            return
        for number, pool in enumerate(self.pools):
            owners = [made[number] for made in self.rows]
            pool.check_integrity(owners)
            taken = np.zeros(PAGES * pool.page_bytes, dtype=np.int64)
            for rows in owners:
                for name, ids in rows.held():
                    np.add.at(taken, row_bytes(pool, ids, name), 1)
            assert taken.max(initial=0) <= 1, "two rows share a byte"
        for made, model in zip(self.rows, self.model, strict=True):
            for rows in made:
                for held, expected in zip(rows, model, strict=True):
                    assert held.text_positions.tolist() == sorted(expected["text"])
                    tiers = zip(held.image_positions.tolist(), held.core.tolist(), strict=True)
                    assert dict(tiers) == expected["image"]
                assert rows.image.core_total == sum(sum(layer["image"].values()) for layer in model)
                assert rows.image.total == sum(len(layer["image"]) for layer in model)
                assert rows.image.width == max(len(layer["image"]) for layer in model)
            for other in made[1:]:
                for ours, theirs in zip(made[0], other, strict=True):
                    assert ours.text_ids.tolist() == theirs.text_ids.tolist()
                    assert ours.image_ids.tolist() == theirs.image_ids.tolist()
                    assert ours.counts() == theirs.counts()


BooksLife.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBooksLife = BooksLife.TestCase


SCORES = st.one_of(st.sampled_from([0.0, -0.0, 0.25, np.inf, -np.inf, np.nan]), st.floats(width=32))


@needs_library
@given(
    scores=st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    share=st.floats(0, 1),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_the_highest_scores_are_the_same(scores: list[list[float]], share: float, kind: type) -> None:
    plain, native = both()
    given_, count = np.array(scores, dtype=kind), 1 + int(share * (len(scores[0]) - 1))
    assert np.array_equal(native.top(given_, count), plain.top(given_, count))


@needs_library
@given(data=st.data(), kind=st.sampled_from([np.float32, np.float64]))
def test_lists_and_scores_are_the_same(data: st.DataObject, kind: type) -> None:
    """Of a table's rows, all or those of a tier, with gaps between the lists, which nobody writes."""
    plain, native = both()
    table, random = TieredTable(LAYERS), np.random.default_rng(data.draw(st.integers(0, 99)))
    for layer in range(LAYERS):
        count = data.draw(st.integers(0, 9))
        ids = random.integers(0, 1000, count).astype(np.int32)
        table.put_tiered(layer, np.arange(count, dtype=np.int32), ids, random.random(count) < 0.5)
    begins = [
        np.array([data.draw(st.integers(30 * n, 30 * n + 15)) for _ in range(LAYERS)], np.int32) for n in range(3)
    ]
    counts = (table.core_counts, table.counts - table.core_counts)
    tiers = [Run(begins[0], table.ids, counts[0], table.core), Run(begins[1], table.ids, counts[1], table.core, False)]
    every = Run(begins[2], table.ids, table.counts)
    lists = [np.full((LAYERS, 100), -1, dtype=np.int32) for _ in range(2)]
    for books, rows in zip((plain, native), lists, strict=True):
        books.gather([*tiers, every], rows)
    assert np.array_equal(*lists)
    assert (lists[0] >= 0).sum() == 2 * table.total
    scores = lists[0].astype(kind)
    for runs in ([every], tiers):
        found = [np.zeros((LAYERS, table.width), dtype=kind) for _ in range(2)]
        for books, to in zip((plain, native), found, strict=True):
            books.scatter(runs, scores, to)
        assert np.array_equal(*found)
        for layer, count in enumerate(table.counts.tolist()):
            assert found[0][layer, :count].tolist() == table.ids[layer, :count].tolist(), "each row's own"


@pytest.mark.parametrize("books", both(), ids=lambda each: type(each).__name__)
def test_a_row_that_is_freed_twice_changes_nothing(books: Books) -> None:
    """Neither one that was free already, nor one that is named twice, nor another's."""
    pool = RowPool(4, SHAPE, books)
    first, second = pool.lease(2), pool.lease(2)
    ids, others = pool.allocate(20, first), pool.allocate(3, second)
    pool.release(ids[:4], first)
    before = (first.held, first.nbytes)
    for wrong in (ids[3:6], ids[[7, 8, 7]], np.concatenate([ids[10:12], others[:1]])):
        with pytest.raises(PoolExhausted, match="freed twice"):
            pool.release(wrong, first)
        assert (first.held, first.nbytes) == before
    pool.release(ids[4:], first)
    assert first.held == first.nbytes == 0


@pytest.mark.parametrize("shape", [(LAYERS, 3), (LAYERS + 1, 4), (LAYERS, 4)])
def test_a_mask_over_other_rows_is_refused(shape: tuple[int, int]) -> None:
    """One that is too narrow or of too many layers, and numbers in the place of truths: nothing is read beyond it."""
    pool = RowPool(8, SHAPE)
    kind = np.int64 if shape == (LAYERS, 4) else np.bool_
    for formats in (Formats(), Formats("exact", "exact", "int4")):
        rows = SequenceRows(pool, LAYERS, 4, formats)
        for layer in range(LAYERS):
            rows.fill(layer, np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.ones(4, dtype=np.bool_), 0)
        for change in (rows.keep_image, rows.keep_text, rows.set_core):
            with pytest.raises(ValueError, match="is no mask over up to 4 rows of 3 layers"):
                change(np.ones(shape, dtype=kind))
        pool.check_integrity([rows])
        rows.close()


def test_what_is_listed_is_not_what_comes_after() -> None:
    """A layer's lists are copies: what is changed in place later does not change them."""
    pool = RowPool(4, SHAPE)
    rows = SequenceRows(pool, LAYERS, 4)
    for layer in range(LAYERS):
        rows.fill(layer, np.arange(2, dtype=np.int32), np.arange(4, dtype=np.int32), np.ones(4, dtype=np.bool_), 0)
    held = rows.layers[1]
    kept = copy.deepcopy((held.image_ids.tolist(), held.text_ids.tolist()))
    lists = (held.image_ids, held.text_ids)
    rows.keep_image(np.zeros((LAYERS, 4), dtype=np.bool_))
    rows.append(9)
    assert tuple(each.tolist() for each in lists) == kept
