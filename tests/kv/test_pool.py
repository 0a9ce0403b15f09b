"""The pool's promises: what a method says that it may hold is what it comes to hold, and pages keep to their leases."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.errors import DoesNotFit, PoolExhausted
from avl_edge.kv.budget import fit, kv_plan, plan_after
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.layout import PAGE_ROWS, page_bytes
from avl_edge.kv.methods import H2O, Avl, Full, Method, Streaming
from avl_edge.kv.pool import RowPool
from avl_edge.kv.pool.compaction import compact
from avl_edge.kv.shared_prefix import QuestionCache, SharedPrefixCache
from avl_edge.kv.store import RowStore
from avl_edge.request import ImageSpan
from tests.equipment.random_methods import LAYERS, NAMES, choices, sharing_methods
from tests.equipment.settled import settle_at_random

SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=2)


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
        settle_at_random(cache, random)


@settings(max_examples=300, deadline=None)
@given(
    choice=choices(),
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


def _full(steps: int) -> SequenceCache:
    """A sequence under full attention whose layers hold 39 image rows each, before its first step."""
    plan = kv_plan(Full(), Formats(), SHAPE, PromptShape(1, 39, 1), steps)
    cache = SequenceCache(RowPool(plan.pages, SHAPE), plan, 41, [ImageSpan("", 1, 39)], LAYERS)
    _run(cache, 0, 1)
    return cache


def test_rows_are_read_where_they_were_compacted_to() -> None:
    """Only their ids change, neither their tier nor their format."""
    cache = _full(steps=2)
    cache.begin_step()
    (old,) = cache.rows_to_read(1)
    for layer in (0, 2):
        cache.rows.keep_image(np.zeros((1, 39), dtype=np.bool_), layer)
    ((_, before, after),) = compact(cache.rows)
    carried = dict(zip(before.tolist(), after.tolist(), strict=True))
    assert set(carried) & set(old.ids[:39].tolist()), "image rows of the layer that lost none"
    _, slots = cache.begin_step()
    (new,) = cache.rows_to_read(1)
    assert new.ids.tolist() == [*(carried.get(row, row) for row in old.ids.tolist()), slots[1]]


def test_a_closed_sequence_keeps_no_lists() -> None:
    """Whoever asked may hold on to it."""
    cache = _full(steps=1)
    cache.begin_step()
    for layer in range(LAYERS):
        cache.rows_to_read(layer)
    lists = [weakref.ref(each) for each in (cache.rows.image.ids, cache.rows.text.ids)]
    cache.close()
    assert all(each() is None for each in lists)


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
    method=sharing_methods(),
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
    begin, length = prefix + images, prefix + images + text
    whole = kv_plan(Full(), names, SHAPE, PromptShape(prefix, images, 0), 0)
    plan = plan_after(method, names, SHAPE, PromptShape(prefix, images, text), begin, steps)
    pool = RowPool(whole.pages + plan.pages, SHAPE)
    shared = SharedPrefixCache(pool, whole, begin, spans, LAYERS)
    _run(shared, 0, 1)
    question = QuestionCache(shared, plan, length, spans)
    _run(question, steps, 2)
    assert (shared.rows.lease.peak, question.rows.lease.peak) == (whole.pages, plan.pages)
    assert question.rows.bytes_borrowed == shared.rows.lease.nbytes
    assert pool.bytes_in_use == shared.rows.lease.nbytes + question.rows.lease.nbytes
    pool.check_integrity([shared.rows, question.rows])


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
