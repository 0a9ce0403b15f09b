"""The pool under random lives of requests: nothing lost, nothing shared by mistake, nothing above its promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avl_edge.budget import fit
from avl_edge.cache import SequenceCache
from avl_edge.config import KvShape, PromptShape
from avl_edge.errors import DoesNotFit, PoolExhausted
from avl_edge.policies import H2O, Avl, FastV, Full, Method, Streaming
from avl_edge.pool import RowPool, RowStore, SequenceRows
from avl_edge.request import ImageSpan

LAYERS = 3
ROW_BYTES = 8


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
    h2o = st.builds(H2O, budget=percent, heavy=st.integers(0, 100), grow=st.integers(0, 1))
    fastv = st.builds(FastV, layer=st.integers(1, LAYERS + 1), drop=st.integers(0, 100))
    streaming = st.builds(Streaming, sinks=st.integers(0, 8), window=st.integers(1, 60))
    return st.one_of(st.just(Full()), avl, h2o, fastv, streaming)


class PoolLife(RuleBasedStateMachine):
    """Admissions, prefills, steps (appends, refreshes, evictions), forks and cancels over one small pool.

    ``written`` says which (owner, layer, position) each row was last written for: a row is read only while it
    still holds what its owner wrote.
    """

    @initialize(capacity=st.integers(50, 400))
    def open(self, capacity: int) -> None:
        self.pool = RowPool(capacity)
        self.live: list[tuple[SequenceCache, int]] = []
        self.forks: list[SequenceRows] = []
        self.written: dict[int, tuple[int, int, int]] = {}
        self.random = np.random.default_rng(0)

    @rule(
        method=_methods(),
        prefix=st.integers(0, 6),
        images=st.lists(st.integers(1, 12), max_size=2),
        text=st.integers(1, 8),
        steps=st.integers(0, 12),
    )
    def admit(self, method: Method, prefix: int, images: list[int], text: int, steps: int) -> None:
        spans, position = [], prefix
        for length in images:
            spans.append(ImageSpan("", position, length))
            position += length + 1
        length = position + text
        shape = PromptShape(
            spans[0].start if spans else length,
            sum(images),
            length - sum(images) - (spans[0].start if spans else length),
        )
        peak = method.peak_rows(shape, steps, LAYERS)
        if peak > self.pool.rows_unreserved:
            with pytest.raises(DoesNotFit):
                SequenceCache(self.pool, method, length, spans, LAYERS, peak)
            return
        cache = SequenceCache(self.pool, method, length, spans, LAYERS, peak)
        self._prefill(cache)
        self.live.append((cache, steps))

    def _prefill(self, cache: SequenceCache) -> None:
        m = cache.length
        for layer in range(LAYERS):
            last, total = self.random.random(m), self.random.random(m)
            index, ids = cache.store_prompt(layer, last, total)
            assert len(index) == len(ids) == len(set(ids.tolist()))
            rows = cache.rows.layers[layer]
            self._write(cache, layer, rows.text_positions, rows.text_ids)
            self._write(cache, layer, rows.image_positions, rows.image_ids)
            survivors = cache.prune_prompt(layer, last, total)
            m = m if survivors is None else len(survivors)

    def _write(self, cache: SequenceCache, layer: int, positions: np.ndarray, ids: np.ndarray) -> None:
        for position, row in zip(positions.tolist(), ids.tolist(), strict=True):
            self.written[row] = (id(cache), layer, position)

    @precondition(lambda self: any(cache.step < steps for cache, steps in self.live))
    @rule(choice=st.integers(0, 10**6))
    def step(self, choice: int) -> None:
        ready = [cache for cache, steps in self.live if cache.step < steps]
        cache = ready[choice % len(ready)]
        position, ids = cache.begin_step()
        for layer in range(LAYERS):
            self.written[int(ids[layer])] = (id(cache), layer, position)
            read = cache.ids_to_read(layer)
            rows = cache.rows.layers[layer]
            where = dict(zip(rows.text_ids.tolist(), rows.text_positions.tolist(), strict=True))
            where |= dict(zip(rows.image_ids.tolist(), rows.image_positions.tolist(), strict=True))
            assert int(ids[layer]) in read
            for row in read.tolist():
                assert self.pool._references[row] > 0, "read after it was freed"
                assert self.written[row] == (id(cache), layer, where[row]), "read what another wrote"
            cache.settle(layer, self.random.random(len(read)) if cache.wants_scores else None)

    @precondition(lambda self: bool(self.live))
    @rule(choice=st.integers(0, 10**6))
    def cancel(self, choice: int) -> None:
        cache, _ = self.live.pop(choice % len(self.live))
        cache.close()
        cache.close()

    @precondition(lambda self: bool(self.live))
    @rule(choice=st.integers(0, 10**6))
    def fork(self, choice: int) -> None:
        cache, _ = self.live[choice % len(self.live)]
        if cache.rows.lease.held <= self.pool.rows_unreserved:
            self.forks.append(cache.rows.fork(cache.rows.lease.held))

    @precondition(lambda self: bool(self.forks))
    @rule(choice=st.integers(0, 10**6))
    def drop_fork(self, choice: int) -> None:
        self.forks.pop(choice % len(self.forks)).close()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity([*(cache.rows for cache, _ in self.live), *self.forks])
            for cache, _ in self.live:
                lease = cache.rows.lease
                assert lease.held <= lease.peak <= lease.limit
                for rows in cache.rows:
                    assert np.all(np.diff(rows.text_positions) > 0)
                    assert np.all(np.diff(rows.image_positions) > 0)
                    assert len(rows.core) == len(rows.image_ids) == len(rows.image_positions)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for cache, _ in self.live:
                cache.close()
            for rows in self.forks:
                rows.close()
            self.pool.check_integrity([])
            assert self.pool.rows_in_use == 0
            assert self.pool.rows_unreserved == self.pool.capacity


PoolLife.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestPoolLife = PoolLife.TestCase


@settings(max_examples=200, deadline=None)
@given(
    method=_methods(),
    prefix=st.integers(0, 20),
    images=st.integers(1, 60),
    text=st.integers(1, 40),
    steps=st.integers(0, 80),
)
def test_the_promised_peak_is_reached_exactly(method: Method, prefix: int, images: int, text: int, steps: int) -> None:
    """``peak_rows`` is neither exceeded (the lease would raise) nor more than what a whole answer takes."""
    promised = method.peak_rows(PromptShape(prefix, images, text), steps, LAYERS)
    length = prefix + images + text
    cache = SequenceCache(RowPool(promised), method, length, [ImageSpan("", prefix, images)], LAYERS, promised)
    random, m = np.random.default_rng(1), length
    for layer in range(LAYERS):
        scores = random.random(m)
        cache.store_prompt(layer, scores, scores)
        survivors = cache.prune_prompt(layer, scores, scores)
        m = m if survivors is None else len(survivors)
    for _ in range(steps):
        cache.begin_step()
        for layer in range(LAYERS):
            read = cache.ids_to_read(layer)
            cache.settle(layer, random.random(len(read)) if cache.wants_scores else None)
    assert cache.rows.lease.peak == promised


def test_misuse_is_refused() -> None:
    pool = RowPool(10)
    lease = pool.lease(4)
    ids = pool.allocate(3, lease)
    with pytest.raises(PoolExhausted, match="exceed a lease of 4"):
        pool.allocate(2, lease)
    with pytest.raises(DoesNotFit, match="6 to give"):
        pool.lease(7)
    with pytest.raises(PoolExhausted, match="still holds 3"):
        pool.end(lease)
    pool.release(ids, lease)
    with pytest.raises(PoolExhausted, match="freed twice"):
        pool.release(ids, lease)
    with pytest.raises(PoolExhausted, match="cannot be shared"):
        pool.retain(ids, lease)
    pool.end(lease)
    with pytest.raises(PoolExhausted, match="lease has ended"):
        pool.allocate(1, lease)


def test_published_memory_of_llava_7b() -> None:
    """A-VL's table: 339 MB for full attention and 163 MB at S 45 C 30 K 3 P 90 T 50, by rows really held.

    The shape is LLaVA-1.5-7B's in fp16; the prompt 576 image and 71 text rows, 35 of them before the image.
    """
    shape = KvShape(layers=32, kv_heads=32, head_dim=128, itemsize=2)
    span = ImageSpan("", 35, 576)
    for method, published in ((Full(), 339e6), (Avl(text_keep=50), 163e6)):
        plan = fit([method], shape, PromptShape(35, 576, 36), 0, None)
        pool = RowPool(plan.peak_rows)
        store = RowStore(pool.capacity, shape, torch.float16, device="meta")
        cache = SequenceCache(pool, method, 647, [span], shape.layers, plan.peak_rows)
        random, m = np.random.default_rng(0), 647
        for layer in range(shape.layers):
            scores = random.random(m)
            cache.store_prompt(layer, scores, scores)
            survivors = cache.prune_prompt(layer, scores, scores)
            m = m if survivors is None else len(survivors)
        held = pool.rows_in_use * shape.row_bytes
        assert held == plan.peak_bytes == store.nbytes
        assert held == pytest.approx(published, rel=0.03)
