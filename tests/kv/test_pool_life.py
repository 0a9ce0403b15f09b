"""The pool under random lives of requests: nothing lost, nothing shared by mistake, nothing above its promise."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avl_edge.config import Formats, KvShape
from avl_edge.errors import DoesNotFit, PoolExhausted
from avl_edge.kv.budget import kv_plan, plan_after
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.methods import Full, Method
from avl_edge.kv.pool import RowPool, SequenceRows
from avl_edge.kv.shared_prefix import QuestionCache, SharedPrefixCache
from avl_edge.request import ImageSpan
from tests.equipment.random_methods import LAYERS, NAMES, choices, sharing_methods
from tests.equipment.row_bytes import row_bytes
from tests.equipment.settled import by_layer, settle

SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=2)
Ids = npt.NDArray[np.int32]


class Memory:
    """Both arenas, one behind the other: whose row each byte was last written for, ``(owner, layer, position)`` as a
    number."""

    def __init__(self, pool: RowPool) -> None:
        self._pool = pool
        self._stamps: dict[tuple[int, int, int], int] = {}
        self._bytes = np.full(pool.pages * pool.page_bytes, -1, dtype=np.int64)

    def stamps(self, owner: object, layer: int, positions: Ids) -> npt.NDArray[np.int64]:
        keys = [(id(owner), layer, position) for position in positions.tolist()]
        return np.array([self._stamps.setdefault(key, len(self._stamps)) for key in keys], dtype=np.int64)

    def write(self, ids: Ids, format_: str, stamps: npt.NDArray[np.int64]) -> None:
        self._bytes[row_bytes(self._pool, ids, format_)] = stamps[:, None]

    def check(self, ids: Ids, format_: str, stamps: npt.NDArray[np.int64]) -> None:
        assert np.all(self._bytes[row_bytes(self._pool, ids, format_)] == stamps[:, None]), "read what another wrote"


def _held(rows: SequenceRows) -> Counter[str]:
    held: Counter[str] = Counter()
    for format_, ids in rows.held():
        held[format_] += len(ids)
    return held


class Life:
    """A request on its way: its cache, the steps that it may still take and the most rows of each format it held."""

    def __init__(self, cache: SequenceCache, steps: int, shared: SharedPrefixCache | None = None) -> None:
        self.cache, self.steps, self.shared = cache, steps, shared
        self.most: Counter[str] = Counter()

    def count(self) -> None:
        self.most |= _held(self.cache.rows)
        pool, lease = self.cache.rows.pool, self.cache.rows.lease
        needed = sum(-(-count // pool.packing(format_).rows) for format_, count in self.most.items())
        assert lease.held <= needed <= lease.limit, "more pages than the rows of each format need"


class PoolLife(RuleBasedStateMachine):
    """Admissions, prefills, steps (appends, refreshes, moves, evictions), shared prefixes and questions about them,
    cancels and interrupts over one small pool. A row is read only while every byte of it is what its owner wrote."""

    @initialize(pages=st.integers(4, 40))
    def open(self, pages: int) -> None:
        self.pool = RowPool(pages, SHAPE)
        self.memory = Memory(self.pool)
        self.live: list[Life] = []
        self.prefixes: list[tuple[SharedPrefixCache, list[ImageSpan]]] = []
        self.random = np.random.default_rng(0)

    @rule(
        choice=choices(),
        prefix=st.integers(0, 6),
        images=st.lists(st.integers(1, 24), max_size=2),
        text=st.integers(1, 8),
        steps=st.integers(0, 12),
    )
    def admit(self, choice: tuple[Method, Formats], prefix: int, images: list[int], text: int, steps: int) -> None:
        spans, position = [], prefix
        for length in images:
            spans.append(ImageSpan("", position, length))
            position += length + 1
        length = position + text
        plan = kv_plan(*choice, SHAPE, prompt_shape(length, spans), steps)
        if plan.pages > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                SequenceCache(self.pool, plan, length, spans, LAYERS)
            return
        self._begin(Life(SequenceCache(self.pool, plan, length, spans, LAYERS), steps))

    @rule(
        text=st.sampled_from(NAMES),
        image=st.sampled_from(NAMES),
        prefix=st.integers(0, 6),
        images=st.lists(st.integers(1, 24), min_size=1, max_size=2),
    )
    def open_prefix(self, text: str, image: str, prefix: int, images: list[int]) -> None:
        """A shared prefix's rows; of two images with a token of text in between."""
        spans = [ImageSpan("", prefix, images[0])]
        spans += [ImageSpan("", prefix + images[0] + 1, length) for length in images[1:]]
        length = spans[-1].start + spans[-1].length
        plan = kv_plan(Full(), Formats(text, image, image), SHAPE, prompt_shape(length, spans), 0)
        if plan.pages > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                SharedPrefixCache(self.pool, plan, length, spans, LAYERS)
            return
        cache = SharedPrefixCache(self.pool, plan, length, spans, LAYERS)
        life = Life(cache, 0)
        self._prefill(life)
        assert cache.rows.lease.peak == plan.pages
        self.prefixes.append((cache, spans))

    @precondition(lambda self: bool(self.prefixes))
    @rule(choice=st.integers(0, 10**6), method=sharing_methods(), text=st.integers(1, 8), steps=st.integers(0, 12))
    def ask(self, choice: int, method: Method, text: int, steps: int) -> None:
        shared, spans = self.prefixes[choice % len(self.prefixes)]
        length = shared.length + text
        plan = plan_after(method, shared.formats, SHAPE, prompt_shape(length, spans), shared.length, steps)
        if plan.pages > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                QuestionCache(shared, plan, length, spans)
            return
        self._begin(Life(QuestionCache(shared, plan, length, spans), steps, shared))

    def _begin(self, life: Life) -> None:
        self._prefill(life)
        self.live.append(life)

    def _stamps(self, life: Life, layer: int, positions: Ids) -> npt.NDArray[np.int64]:
        """Who wrote the rows at ``positions`` of a layer: the sequence itself, or its prefix."""
        own = self.memory.stamps(life.cache, layer, positions)
        lent = positions < life.cache.begin
        own[lent] = self.memory.stamps(life.shared, layer, positions[lent])
        return own

    def _prefill(self, life: Life) -> None:
        cache, m = life.cache, life.cache.length
        for layer in range(LAYERS):
            last, total = self.random.random(m), self.random.random(m)
            stored = cache.store_prompt(layer, last, total, last)
            rows = cache.rows.layers[layer]
            places = np.concatenate([each.order for each in stored] or [np.empty(0, dtype=np.int64)])
            positions = np.concatenate([each.positions for each in stored] or [np.empty(0, dtype=np.int32)])
            assert len(set(places.tolist())) == len(places) == len(positions)
            held = {*rows.text_positions.tolist(), *rows.image_positions.tolist()}
            assert set(positions.tolist()) == {position for position in held if position >= cache.begin}
            assert len(held) == len(rows.text_ids) + len(rows.image_ids)
            assert [each.format for each in stored] == list(dict.fromkeys(each.format for each in stored))
            for each in stored:
                self.memory.write(each.ids, each.format, self._stamps(life, layer, each.positions))
            survivors = cache.prune_prompt(layer, last, total, last)
            m = m if survivors is None else len(survivors)
        life.count()
        self._check_contents(life)

    def _check_contents(self, life: Life) -> None:
        """Every row holds what was written there, in the format of its tier."""
        rows = life.cache.rows
        for layer, held in enumerate(rows):
            formats = rows.formats
            core, image = self._stamps(life, layer, held.image_positions), held.core
            self.memory.check(held.image_ids[image], formats.core, core[image])
            self.memory.check(held.image_ids[~image], formats.secondary, core[~image])
            self.memory.check(held.text_ids, formats.text, self._stamps(life, layer, held.text_positions))

    @precondition(lambda self: any(life.cache.step < life.steps for life in self.live))
    @rule(choice=st.integers(0, 10**6))
    def step(self, choice: int) -> None:
        ready = [life for life in self.live if life.cache.step < life.steps]
        life = ready[choice % len(ready)]
        cache = life.cache
        position, ids = cache.begin_step()
        life.count()
        for layer in range(LAYERS):
            own = self.memory.stamps(cache, layer, np.array([position], dtype=np.int32))
            self.memory.write(ids[layer : layer + 1], cache.rows.formats.text, own)
            if cache.picks_core:
                scanned = cache.rows_scanned_now.of(layer)
                assert np.array_equal(scanned.ids, cache.rows.layers[layer].image_ids)
                cache.pick_core(layer, self.random.random(len(scanned.ids)))
        scores = []
        for layer in range(LAYERS):
            read = cache.rows_to_read(layer)
            self._check_read(life, layer, read, int(ids[layer]))
            scores.append(self.random.random(sum(map(len, read))))
        moved = settle(cache, scores if cache.wants_scores else None)
        for layer, of_layer in by_layer(moved, LAYERS):
            self._move(life, layer, of_layer)
        life.count()
        self._check_contents(life)

    def _check_read(self, life: Life, layer: int, read: list[Any], own: int) -> None:
        cache = life.cache
        rows, refreshes = cache.rows.layers[layer], cache.policy.reads_secondary(cache.step)
        image = rows.image_positions if refreshes else rows.image_positions[rows.core]
        expected = [*image.tolist(), *rows.text_positions.tolist()]
        by_place = {
            place: position
            for each in read
            for place, position in zip(each.order.tolist(), each.positions.tolist(), strict=True)
        }
        assert [by_place[place] for place in range(len(expected))] == expected
        assert own in next(each.ids for each in read if each.format == cache.rows.formats.text)
        for each in read:
            assert np.all(np.diff(each.order) > 0), "sums depend on the order: image rows by position, then text rows"
            self.memory.check(each.ids, each.format, self._stamps(life, layer, each.positions))

    def _move(self, life: Life, layer: int, moved: list[Any]) -> None:
        """What changes its format is read before anything is written, and is where its new tier says."""
        stamps = [self._stamps(life, layer, each.positions) for each in moved]
        for each, stamp in zip(moved, stamps, strict=True):
            assert each.old_format != each.new_format
            assert len(each.before) == len(each.after) == len(each.positions) > 0
            self.memory.check(each.before, each.old_format, stamp)
        for each, stamp in zip(moved, stamps, strict=True):
            self.memory.write(each.after, each.new_format, stamp)

    @precondition(lambda self: bool(self.live))
    @rule(choice=st.integers(0, 10**6))
    def cancel(self, choice: int) -> None:
        life = self.live.pop(choice % len(self.live))
        life.cache.close()
        life.cache.close()

    @precondition(lambda self: bool(self._idle()))
    @rule(choice=st.integers(0, 10**6))
    def close_session(self, choice: int) -> None:
        idle = self._idle()
        shared = idle[choice % len(idle)]
        shared[0].close()
        self.prefixes.remove(shared)

    def _idle(self) -> list[tuple[SharedPrefixCache, list[ImageSpan]]]:
        """Shared prefixes about which no question is on its way."""
        return [each for each in self.prefixes if all(life.shared is not each[0] for life in self.live)]

    @precondition(lambda self: bool(self.live))
    @rule(choice=st.integers(0, 10**6), name=st.sampled_from(NAMES), takes=st.booleans())
    def interrupt(self, choice: int, name: str, takes: bool) -> None:
        """A request is given up between two lines: rows were taken or given back, and nobody has written it down."""
        rows = self.live.pop(choice % len(self.live)).cache.rows
        if takes:
            with suppress(PoolExhausted):
                self.pool.allocate(LAYERS, rows.lease, name)
        else:
            format_, ids = max(rows.held(), key=lambda each: len(each[1]), default=("exact", np.empty(0, np.int32)))
            self.pool.release(ids[::2], rows.lease, format_)
        self.pool.rebuild(self._owners())

    def _owners(self) -> list[SequenceRows]:
        return [*(life.cache.rows for life in self.live), *(shared.rows for shared, _ in self.prefixes)]

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self._owners())
        for life in self.live:
            lease = life.cache.rows.lease
            assert lease.held <= lease.peak <= lease.limit
            for rows in life.cache.rows:
                assert np.all(np.diff(rows.text_positions) > 0)
                assert np.all(np.diff(rows.image_positions) > 0)
                assert len(rows.core) == len(rows.image_ids) == len(rows.image_positions)
        weights = (_held(rows).items() for rows in self._owners())
        nbytes = sum(count * self.pool.packing(name).row_bytes for held in weights for name, count in held)
        assert self.pool.bytes_in_use == nbytes

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for rows in self._owners():
                rows.close()
            self.pool.check_integrity([])
            assert self.pool.bytes_in_use == 0
            assert self.pool.pages_unreserved == self.pool.pages


PoolLife.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestPoolLife = PoolLife.TestCase
