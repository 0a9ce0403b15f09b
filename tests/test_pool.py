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

from avl_edge.budget import fit, kv_plan, plan_after
from avl_edge.cache import SequenceCache, prompt_shape
from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.errors import DoesNotFit, PoolExhausted
from avl_edge.layout import PAGE_ROWS, UNIT, Format, page_bytes
from avl_edge.policies import H2O, Avl, Coarse, FastV, Full, Method, Streaming
from avl_edge.pool import RowPool, RowStore, SequenceRows
from avl_edge.request import ImageSpan
from avl_edge.shared import QuestionCache, SceneCache

LAYERS = 3
SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=2)
NAMES = ("exact", "int8", "int4")
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


def _sharing_methods() -> st.SearchStrategy[Method]:
    """Methods that store every image row."""
    percent = st.integers(1, 100)
    avl = st.builds(
        lambda core, k, t, floor: Avl(100, 100, core, k, t, text_floor=floor),
        percent,
        st.integers(0, 4),
        percent,
        st.integers(1, 8),
    )
    coarse = st.builds(lambda core, mass, by: Coarse(100, core, mass, by), percent, percent, st.integers(0, 1))
    return st.one_of(st.just(Full()), avl, coarse)


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

    def __init__(self, cache: SequenceCache, steps: int, scene: SceneCache | None = None) -> None:
        self.cache, self.steps, self.scene = cache, steps, scene
        self.most: Counter[str] = Counter()

    def count(self) -> None:
        self.most |= _held(self.cache.rows)
        pool, lease = self.cache.rows.pool, self.cache.rows.lease
        needed = sum(-(-count // pool.packing(format_).rows) for format_, count in self.most.items())
        assert lease.held <= needed <= lease.limit, "more pages than the rows of each format need"


class PoolLife(RuleBasedStateMachine):
    """Admissions, prefills, steps (appends, refreshes, moves, evictions), scenes and questions about them, cancels and
    interrupts over one small pool. A row is read only while every byte of it is what its owner wrote."""

    @initialize(pages=st.integers(4, 40))
    def open(self, pages: int) -> None:
        self.pool = RowPool(pages, SHAPE)
        self.memory = Memory(self.pool)
        self.live: list[Life] = []
        self.scenes: list[tuple[SceneCache, list[ImageSpan]]] = []
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
        self._begin(Life(SequenceCache(self.pool, plan, length, spans, LAYERS), steps))

    @rule(
        text=st.sampled_from(NAMES),
        image=st.sampled_from(NAMES),
        prefix=st.integers(0, 6),
        images=st.lists(st.integers(1, 24), min_size=1, max_size=2),
    )
    def look(self, text: str, image: str, prefix: int, images: list[int]) -> None:
        """A scene's rows; of two images with a token of text in between."""
        spans = [ImageSpan("", prefix, images[0])]
        spans += [ImageSpan("", prefix + images[0] + 1, length) for length in images[1:]]
        length = spans[-1].start + spans[-1].length
        plan = kv_plan(Full(), Formats(text, image, image), SHAPE, prompt_shape(length, spans), 0)
        if plan.pages > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                SceneCache(self.pool, plan, length, spans, LAYERS)
            return
        cache = SceneCache(self.pool, plan, length, spans, LAYERS)
        life = Life(cache, 0)
        self._prefill(life)
        assert cache.rows.lease.peak == plan.pages
        self.scenes.append((cache, spans))

    @precondition(lambda self: bool(self.scenes))
    @rule(choice=st.integers(0, 10**6), method=_sharing_methods(), text=st.integers(1, 8), steps=st.integers(0, 12))
    def ask(self, choice: int, method: Method, text: int, steps: int) -> None:
        scene, spans = self.scenes[choice % len(self.scenes)]
        length = scene.length + text
        plan = plan_after(method, scene.formats, SHAPE, prompt_shape(length, spans), scene.length, steps)
        if plan.pages > self.pool.pages_unreserved:
            with pytest.raises(DoesNotFit):
                QuestionCache(scene, plan, length, spans)
            return
        self._begin(Life(QuestionCache(scene, plan, length, spans), steps, scene))

    def _begin(self, life: Life) -> None:
        self._prefill(life)
        self.live.append(life)

    def _stamps(self, life: Life, layer: int, positions: Ids) -> npt.NDArray[np.int64]:
        """Who wrote the rows at ``positions`` of a layer: the sequence itself, or its scene."""
        own = self.memory.stamps(life.cache, layer, positions)
        lent = positions < life.cache.begin
        own[lent] = self.memory.stamps(life.scene, layer, positions[lent])
        return own

    def _prefill(self, life: Life) -> None:
        cache, m = life.cache, life.cache.length
        for layer in range(LAYERS):
            last, total = self.random.random(m), self.random.random(m)
            stored = cache.store_prompt(layer, last, total, last)
            rows = cache.rows.layers[layer]
            places = np.concatenate([each.places for each in stored] or [np.empty(0, dtype=np.int64)])
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
                (looked_at,) = cache.rows_to_look_at(layer)
                assert np.array_equal(looked_at.ids, cache.rows.layers[layer].image_ids)
                cache.pick_core(layer, self.random.random(len(looked_at.ids)))
            read = cache.rows_to_read(layer)
            self._check_read(life, layer, read, int(ids[layer]))
            count = sum(len(each.ids) for each in read)
            self._move(life, layer, cache.settle(layer, self.random.random(count) if cache.wants_scores else None))
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
            for place, position in zip(each.places.tolist(), each.positions.tolist(), strict=True)
        }
        assert [by_place[place] for place in range(len(expected))] == expected
        assert own in next(each.ids for each in read if each.format == cache.rows.formats.text)
        for each in read:
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
    def close_scene(self, choice: int) -> None:
        idle = self._idle()
        scene = idle[choice % len(idle)]
        scene[0].close()
        self.scenes.remove(scene)

    def _idle(self) -> list[tuple[SceneCache, list[ImageSpan]]]:
        """Scenes about which no question is on its way."""
        return [each for each in self.scenes if all(life.scene is not each[0] for life in self.live)]

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
        return [*(life.cache.rows for life in self.live), *(scene.rows for scene, _ in self.scenes)]

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


def _run(cache: SequenceCache, steps: int, seed: int) -> None:
    """A whole answer on random scores."""
    random, m = np.random.default_rng(seed), cache.length
    for layer in range(len(cache.rows.layers)):
        scores = random.random(m)
        cache.store_prompt(layer, scores, scores, scores)
        survivors = cache.prune_prompt(layer, scores, scores, scores)
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


@settings(max_examples=200, deadline=None)
@given(
    method=_sharing_methods(),
    formats=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    prefix=st.integers(0, 20),
    images=st.integers(1, 60),
    text=st.integers(1, 40),
    steps=st.integers(0, 80),
)
def test_what_a_question_adds_is_promised_exactly(
    method: Method, formats: tuple[str, str], prefix: int, images: int, text: int, steps: int
) -> None:
    """And a picture's rows are counted once, in their own plan: both leases together fill the pool."""
    names, spans = Formats(formats[0], formats[1], formats[1]), [ImageSpan("", prefix, images)]
    shared, length = prefix + images, prefix + images + text
    whole = kv_plan(Full(), names, SHAPE, PromptShape(prefix, images, 0), 0)
    plan = plan_after(method, names, SHAPE, PromptShape(prefix, images, text), shared, steps)
    pool = RowPool(whole.pages + plan.pages, SHAPE)
    scene = SceneCache(pool, whole, shared, spans, LAYERS)
    _run(scene, 0, 1)
    question = QuestionCache(scene, plan, length, spans)
    _run(question, steps, 2)
    assert (scene.rows.lease.peak, question.rows.lease.peak) == (whole.pages, plan.pages)
    assert question.rows.bytes_borrowed == scene.rows.lease.nbytes
    assert pool.bytes_in_use == scene.rows.lease.nbytes + question.rows.lease.nbytes
    pool.check_integrity([scene.rows, question.rows])


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
