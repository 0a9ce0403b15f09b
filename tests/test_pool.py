"""The pool under random lives of requests: nothing lost, nothing shared by mistake, nothing above its promise."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avl_edge.budget import KvPlan, fit, kv_plan
from avl_edge.cache import SequenceCache, prompt_shape
from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.errors import DoesNotFit, PoolExhausted
from avl_edge.layout import PAGE_ROWS, UNIT, Format, page_bytes
from avl_edge.policies import H2O, Avl, Coarse, FastV, Full, Method, Streaming
from avl_edge.pool import RowPool, RowStore, SequenceRows
from avl_edge.request import ImageSpan

LAYERS = 3
SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=2)
NAMES = ("exact", "int8", "int4")
KEEPS_ITS_ROWS = (Full, FastV, Coarse)
"""Methods that free no row before a request ends."""

Ids = npt.NDArray[np.int32]


def _methods() -> st.SearchStrategy[Method]:
    percent = st.integers(1, 100)
    triple = st.tuples(percent, percent, percent).map(lambda values: sorted(values, reverse=True))
    avl = st.builds(
        lambda psc, k, t, floor: Avl(*map(float, psc), refresh=k, text_keep=t, text_floor=floor, prune_layer=1),
        triple,
        st.integers(0, 4),
        percent,
        st.integers(1, 8),
    )
    coarse = st.builds(lambda sc, mass: Coarse(max(sc), min(sc), mass), st.tuples(percent, percent), percent)
    h2o = st.builds(H2O, budget=percent, heavy=st.integers(0, 100), grow=st.integers(0, 1))
    fastv = st.builds(FastV, layer=st.integers(1, LAYERS + 1), drop=st.integers(0, 100))
    streaming = st.builds(Streaming, sinks=st.integers(0, 8), window=st.integers(1, 60))
    return st.one_of(st.just(Full()), avl, avl, coarse, h2o, fastv, streaming)


@st.composite
def _choices(draw: st.DrawFn) -> tuple[Method, Formats]:
    method, names = draw(_methods()), st.sampled_from(NAMES)
    core = draw(names)
    return method, Formats(draw(names), core, core if isinstance(method, Coarse) else draw(names))


class Memory:
    """Both arenas as one: whose row each byte was last written for, ``(owner, layer, position)`` as a number."""

    def __init__(self, pool: RowPool) -> None:
        self._pool = pool
        self._stamps: dict[tuple[int, int, int], int] = {}
        self._bytes = np.full(pool.pages * pool.page_bytes // 2, -1, dtype=np.int64)

    def _places(self, ids: Ids, format_: str) -> npt.NDArray[np.int64]:
        """The bytes of rows ``[n, bytes of a row]``: an exact one by its number, a packed one from where it begins."""
        half_row = SHAPE.row_bytes // 2
        unit, size = (half_row, half_row) if format_ == "exact" else (UNIT, Format(format_).record_bytes(SHAPE))
        return ids.astype(np.int64)[:, None] * unit + np.arange(size)

    def stamps(self, owner: object, layer: int, positions: Ids) -> npt.NDArray[np.int64]:
        keys = [(id(owner), layer, position) for position in positions.tolist()]
        return np.array([self._stamps.setdefault(key, len(self._stamps)) for key in keys], dtype=np.int64)

    def write(self, ids: Ids, format_: str, stamps: npt.NDArray[np.int64]) -> None:
        self._bytes[self._places(ids, format_)] = stamps[:, None]

    def check(self, ids: Ids, format_: str, stamps: npt.NDArray[np.int64]) -> None:
        assert np.all(self._bytes[self._places(ids, format_)] == stamps[:, None]), "read what another wrote"


def _held(rows: SequenceRows) -> Counter[str]:
    held: Counter[str] = Counter()
    for format_, ids in rows.held():
        held[format_] += len(ids)
    return held


class Life:
    """A request on its way: its cache, the steps that it may still take and the most rows of each format it held."""

    def __init__(self, pool: RowPool, plan: KvPlan[Method], length: int, spans: list[ImageSpan], steps: int) -> None:
        self.cache = SequenceCache(pool, plan, length, spans, LAYERS)
        self.method, self.steps = plan.method, steps
        self.most: Counter[str] = Counter()

    def count(self) -> None:
        self.most |= _held(self.cache.rows)
        pool, lease = self.cache.rows.pool, self.cache.rows.lease
        needed = sum(-(-count // pool.packing(format_).rows) for format_, count in self.most.items())
        assert lease.held <= needed <= lease.limit, "more pages than the rows of each format need"


class PoolLife(RuleBasedStateMachine):
    """Admissions, prefills, steps (appends, refreshes, moves, evictions), forks, cancels and interrupts over one small
    pool. A row is read only while every byte of it is what its owner wrote."""

    @initialize(pages=st.integers(4, 40))
    def open(self, pages: int) -> None:
        self.pool = RowPool(pages, SHAPE)
        self.memory = Memory(self.pool)
        self.live: list[Life] = []
        self.forks: list[tuple[SequenceRows, Life]] = []
        self.random = np.random.default_rng(0)

    @rule(
        choice=_choices(),
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
        life = Life(self.pool, plan, length, spans, steps)
        self._prefill(life)
        self.live.append(life)

    def _prefill(self, life: Life) -> None:
        cache, m = life.cache, life.cache.length
        for layer in range(LAYERS):
            last, total = self.random.random(m), self.random.random(m)
            stored = cache.store_prompt(layer, last, total)
            rows = cache.rows.layers[layer]
            places = np.concatenate([each.places for each in stored] or [np.empty(0, dtype=np.int64)])
            positions = np.concatenate([each.positions for each in stored] or [np.empty(0, dtype=np.int32)])
            assert len(set(places.tolist())) == len(places) == len(rows.text_ids) + len(rows.image_ids)
            assert set(positions.tolist()) == {*rows.text_positions.tolist(), *rows.image_positions.tolist()}
            assert [each.format for each in stored] == list(dict.fromkeys(each.format for each in stored))
            for each in stored:
                self.memory.write(each.ids, each.format, self.memory.stamps(cache, layer, each.positions))
            survivors = cache.prune_prompt(layer, last, total)
            m = m if survivors is None else len(survivors)
        life.count()
        self._check_contents(cache, cache.rows)

    def _check_contents(self, writer: object, rows: SequenceRows) -> None:
        """Every row of the prompt holds what ``writer`` wrote there, in the format of its tier."""
        for layer, held in enumerate(rows):
            formats = rows.formats
            core, image = self.memory.stamps(writer, layer, held.image_positions), held.core
            self.memory.check(held.image_ids[image], formats.core, core[image])
            self.memory.check(held.image_ids[~image], formats.secondary, core[~image])

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
                (looked_at,) = cache.rows_to_look_at(layer)
                assert np.array_equal(looked_at.ids, cache.rows.layers[layer].image_ids)
                cache.pick_core(layer, self.random.random(len(looked_at.ids)))
            read = cache.rows_to_read(layer)
            self._check_read(cache, layer, read, int(ids[layer]))
            count = sum(len(each.ids) for each in read)
            self._move(cache, layer, cache.settle(layer, self.random.random(count) if cache.wants_scores else None))
            life.count()
        self._check_contents(cache, cache.rows)

    def _check_read(self, cache: SequenceCache, layer: int, read: list[Any], own: int) -> None:
        rows, refreshes = cache.rows.layers[layer], cache.policy.reads_secondary(cache.step)
        image = rows.image_positions if refreshes else rows.image_positions[rows.core]
        expected = [*image.tolist(), *rows.text_positions.tolist()]
        by_place = {
            place: position
            for each in read
            for place, position in zip(each.places.tolist(), each.positions.tolist(), strict=True)
        }
        assert [by_place[place] for place in range(len(expected))] == expected
        assert own in next(each.ids for each in read if each.format == cache.rows.formats.text)
        for each in read:
            self.memory.check(each.ids, each.format, self.memory.stamps(cache, layer, each.positions))

    def _move(self, cache: SequenceCache, layer: int, moved: list[Any]) -> None:
        """What changes its format is read before anything is written, and is where its new tier says."""
        stamps = [self.memory.stamps(cache, layer, each.positions) for each in moved]
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

    @precondition(lambda self: any(_can_fork(life) for life in self.live))
    @rule(choice=st.integers(0, 10**6), extra=st.integers(0, 2))
    def fork(self, choice: int, extra: int) -> None:
        ready = [life for life in self.live if _can_fork(life)]
        life = ready[choice % len(ready)]
        limit = life.cache.rows.lease.held + extra
        if limit > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                life.cache.rows.fork(limit)
            return
        if not isinstance(life.method, KEEPS_ITS_ROWS):
            life.steps = 0  # who shares rows keeps them
        fork = life.cache.rows.fork(limit)
        assert fork.lease.nbytes == life.cache.rows.lease.nbytes
        self.forks.append((fork, life))

    @precondition(lambda self: bool(self.forks))
    @rule(choice=st.integers(0, 10**6))
    def grow_fork(self, choice: int) -> None:
        """A fork's later text is its own; beyond its lease it is refused, and nothing has changed."""
        fork, life = self.forks[choice % len(self.forks)]
        before = [rows.text_ids for rows in fork]
        position = life.cache.length + 1000 + len(before[0])
        try:
            ids = fork.append(position)
        except PoolExhausted:
            assert all(rows.text_ids is ids for rows, ids in zip(fork, before, strict=True))
            return
        for layer, row in enumerate(ids.tolist()):
            own = self.memory.stamps(fork, layer, np.array([position], dtype=np.int32))
            self.memory.write(np.array([row], dtype=np.int32), fork.formats.text, own)

    @precondition(lambda self: bool(self.forks))
    @rule(choice=st.integers(0, 10**6))
    def drop_fork(self, choice: int) -> None:
        self.forks.pop(choice % len(self.forks))[0].close()

    @precondition(lambda self: bool(self.live))
    @rule(choice=st.integers(0, 10**6), name=st.sampled_from(NAMES), takes=st.booleans())
    def interrupt(self, choice: int, name: str, takes: bool) -> None:
        """A request is given up between two lines: rows were taken or given back, and nobody has written it down."""
        rows = self.live.pop(choice % len(self.live)).cache.rows
        if takes:
            with suppress(PoolExhausted):
                self.pool.allocate(LAYERS, rows.lease, name)
        else:
            format_, ids = max(rows.held(), key=lambda each: len(each[1]))
            self.pool.release(ids[::2], rows.lease, format_)
        self.pool.rebuild(self._owners())

    def _owners(self) -> list[SequenceRows]:
        return [*(life.cache.rows for life in self.live), *(fork for fork, _ in self.forks)]

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self._owners())
        for fork, life in self.forks:
            self._check_contents(life.cache, fork)
        for life in self.live:
            lease = life.cache.rows.lease
            assert lease.held <= lease.peak <= lease.limit
            for rows in life.cache.rows:
                assert np.all(np.diff(rows.text_positions) > 0)
                assert np.all(np.diff(rows.image_positions) > 0)
                assert len(rows.core) == len(rows.image_ids) == len(rows.image_positions)
        if not self.forks:
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


def _can_fork(life: Life) -> bool:
    formats = life.cache.rows.formats
    return formats.core == formats.secondary


PoolLife.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestPoolLife = PoolLife.TestCase


def _run(cache: SequenceCache, steps: int, seed: int) -> None:
    """A whole answer on random scores."""
    random, m = np.random.default_rng(seed), cache.length
    for layer in range(len(cache.rows.layers)):
        scores = random.random(m)
        cache.store_prompt(layer, scores, scores)
        survivors = cache.prune_prompt(layer, scores, scores)
        m = m if survivors is None else len(survivors)
    for _ in range(steps):
        cache.begin_step()
        for layer in range(len(cache.rows.layers)):
            if cache.picks_core:
                (looked_at,) = cache.rows_to_look_at(layer)
                cache.pick_core(layer, random.random(len(looked_at.ids)))
            count = sum(len(each.ids) for each in cache.rows_to_read(layer))
            cache.settle(layer, random.random(count) if cache.wants_scores else None)


@settings(max_examples=300, deadline=None)
@given(
    choice=_choices(),
    prefix=st.integers(0, 20),
    images=st.integers(1, 60),
    text=st.integers(1, 40),
    steps=st.integers(0, 80),
)
def test_the_promised_peak_is_reached_exactly(
    choice: tuple[Method, Formats], prefix: int, images: int, text: int, steps: int
) -> None:
    """The promised pages are neither exceeded (the lease would raise) nor more than what a whole answer takes.

    Where image and text rows share one budget and weigh differently, either may fill it: an upper bound.
    """
    method, formats = choice
    plan = kv_plan(method, formats, SHAPE, PromptShape(prefix, images, text), steps)
    spans = [ImageSpan("", prefix, images)]
    cache = SequenceCache(RowPool(plan.pages, SHAPE), plan, prefix + images + text, spans, LAYERS)
    _run(cache, steps, 1)
    if isinstance(method, H2O | Streaming) and formats.text != formats.core:
        assert cache.rows.lease.peak <= plan.pages
    else:
        assert cache.rows.lease.peak == plan.pages
    assert plan.peak_bytes == plan.pages * page_bytes(SHAPE)
    if formats.all_exact:
        assert plan.pages == -(-method.peak_rows(PromptShape(prefix, images, text), steps, LAYERS) // PAGE_ROWS)


def test_misuse_is_refused() -> None:
    pool = RowPool(10, SHAPE)
    lease = pool.lease(4)
    ids = pool.allocate(3 * PAGE_ROWS, lease)
    with pytest.raises(PoolExhausted, match="5 pages exceed a lease of 4"):
        pool.allocate(PAGE_ROWS + 1, lease)
    with pytest.raises(PoolExhausted, match="5 pages exceed a lease of 4"):
        pool.allocate(pool.packing("int8").rows + 1, lease, "int8")
    with pytest.raises(DoesNotFit, match="6 to give"):
        pool.lease(7)
    with pytest.raises(PoolExhausted, match="rows in 3 pages"):
        pool.end(lease)
    pool.release(ids, lease)
    with pytest.raises(PoolExhausted, match="freed twice"):
        pool.release(ids, lease)
    with pytest.raises(PoolExhausted, match="cannot be shared"):
        pool.retain(ids, lease)
    pool.end(lease)
    with pytest.raises(PoolExhausted, match="lease has ended"):
        pool.allocate(1, lease)


def test_a_lease_that_was_refused_rows_is_as_it_was() -> None:
    pool = RowPool(4, SHAPE)
    lease = pool.lease(2)
    ids = pool.allocate(PAGE_ROWS + 3, lease)
    with pytest.raises(PoolExhausted):
        pool.allocate(PAGE_ROWS, lease)
    rest = pool.allocate(PAGE_ROWS - 3, lease)
    assert len({*ids.tolist(), *rest.tolist()}) == 2 * PAGE_ROWS
    assert lease.held == lease.peak == 2


def test_pages_are_reused_across_formats_and_requests() -> None:
    """An empty page serves any format and anybody; one with a row left in it serves its own format and lease alone."""
    pool = RowPool(2, SHAPE)
    first, second = pool.lease(1), pool.lease(1)
    ids = pool.allocate(pool.packing("int8").rows, first, "int8")
    pool.release(ids[1:], first, "int8")
    with pytest.raises(PoolExhausted):
        pool.allocate(1, first, "int4")
    other = pool.allocate(1, second, "int8")
    page = pool.packing("int8").page_step
    assert other[0] // page != ids[0] // page
    assert set(pool.allocate(len(ids) - 1, first, "int8").tolist()) == set(ids[1:].tolist())
    pool.release(ids, first, "int8")
    assert len(pool.allocate(pool.packing("int4").rows, first, "int4")) > len(ids)


def test_rows_that_are_shared_outlive_their_first_owner() -> None:
    """The page stays with who still holds a row in it, and is free when nobody does."""
    pool = RowPool(3, SHAPE)
    first = SequenceRows(pool, 1, 1, Formats("int8", "int8", "int8"))
    first.fill(0, np.arange(3, dtype=np.int32), np.arange(3, 9, dtype=np.int32), np.ones(6, dtype=np.bool_), 0)
    fork = first.fork(1)
    held = pool.bytes_in_use
    assert held == first.lease.nbytes == fork.lease.nbytes == 9 * pool.packing("int8").row_bytes
    first.close()
    pool.check_integrity([fork])
    assert pool.bytes_in_use == held
    with pytest.raises(PoolExhausted):
        fork.append(9)
    fork.close()
    pool.check_integrity([])
    assert pool.bytes_in_use == 0


def test_published_memory_of_llava_7b() -> None:
    """A-VL's table: 339 MB for full attention and 163 MB at S 45 C 30 K 3 P 90 T 50, by rows really held.

    The shape is LLaVA-1.5-7B's in fp16; the prompt 576 image and 71 text rows, 35 of them before the image.
    """
    shape = KvShape(layers=32, kv_heads=32, head_dim=128, itemsize=2)
    span = ImageSpan("", 35, 576)
    for method, published in ((Full(), 339e6), (Avl(text_keep=50), 163e6)):
        plan = fit([(method, Formats())], shape, PromptShape(35, 576, 36), 0, None)
        pool = RowPool(plan.pages, shape)
        store = RowStore(pool.pages, shape, torch.float16, device="meta")
        cache = SequenceCache(pool, plan, 647, [span], shape.layers)
        _run(cache, 0, 0)
        rows = method.peak_rows(PromptShape(35, 576, 36), 0, 32)
        assert pool.bytes_in_use == rows * shape.row_bytes
        assert pool.bytes_in_use == plan.peak_bytes == store.nbytes, "these rows fill their pages"
        assert pool.bytes_in_use == pytest.approx(published, rel=0.03)
