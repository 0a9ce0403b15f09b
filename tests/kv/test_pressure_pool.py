"""What there is to give: smaller formats, the least important rows, compacted pages, and the memory itself."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.methods import Avl
from avl_edge.kv.methods.policy import PromptLayer
from avl_edge.kv.pool import RowPool, SequenceRows
from avl_edge.kv.pool.compaction import compact, smaller_formats
from avl_edge.kv.store import RowStore
from avl_edge.machine.allocator import advise_free
from tests import ROOT
from tests.equipment.pressure_harness import SHAPE, SIZE
from tests.equipment.random_methods import LAYERS, NAMES
from tests.equipment.settled import settle_policy


def test_avl_gives_the_rows_that_its_last_refresh_scored_lowest() -> None:
    policy = Avl(90, 50, 20, refresh=2).policy(PromptShape(1, 10, 1), 1)
    scores = np.array([0, 5, 4, 9, 8, 1, 0, 0, 7, 0, 0, 0], dtype=np.float32)
    is_image = np.array([False] + [True] * 10 + [False])
    is_suffix = np.array([False] * 11 + [True])
    kept = policy.keep_prompt(PromptLayer(0, np.arange(12, dtype=np.int32), is_image, is_suffix, scores, scores))
    assert np.flatnonzero(kept.stored & is_image).tolist() == [1, 2, 3, 4, 8]
    core = kept.core[kept.stored & is_image]
    assert core.tolist() == [False, False, True, True, False]
    assert policy.evictable(0, core) == 3
    assert policy.evict(0, core, 1).tolist() == [True, False, True, True, True]
    image, text = np.array([[3, 9, 1, 8]], dtype=np.float32), np.array([[1, 1, 1]], dtype=np.float32)
    settled = settle_policy(policy, 2, image, text).core
    assert settled is not None
    (refreshed,) = settled
    assert refreshed.tolist() == [False, True, False, True]
    assert policy.evict(0, refreshed, 1).tolist() == [True, True, False, True]


@given(text=st.sampled_from(NAMES), core=st.sampled_from(NAMES), secondary=st.sampled_from(NAMES), one=st.booleans())
def test_formats_only_ever_get_smaller(text: str, core: str, secondary: str, one: bool) -> None:
    formats, seen = Formats(text, core, secondary), 0
    while (smaller := smaller_formats(formats, one, SHAPE)) is not None:
        assert smaller.text == text
        assert one or smaller.core == core
        assert not one or SIZE[smaller.core] == SIZE[formats.core] + 1
        assert one or SIZE[smaller.secondary] == SIZE[formats.secondary] + 1
        formats, seen = smaller, seen + 1
    assert seen <= 3


def test_a_format_that_does_not_suit_or_would_be_no_smaller_is_passed_over() -> None:
    assert smaller_formats(Formats("exact", "lowrank:4", "lowrank:4"), True, SHAPE) is None
    assert smaller_formats(Formats(), True, KvShape(1, 2, 15, 4)) is None
    # Of 16 and 40 bytes of keys, records of one unit of scales and two of int8 values, or one of int4 values: 48, 32.
    assert smaller_formats(Formats(), True, KvShape(1, 1, 8, 2)) is None
    assert smaller_formats(Formats(), True, KvShape(1, 1, 20, 2)) == Formats("exact", "int4", "int4")


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=LAYERS, max_size=LAYERS),
    format_=st.sampled_from(NAMES),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_compacted_rows_need_the_fewest_pages(
    counts: list[tuple[int, int]], format_: str, share: float, seed: int
) -> None:
    pool, random = RowPool(60, SHAPE), np.random.default_rng(seed)
    rows = SequenceRows(pool, LAYERS, 60, Formats(format_, format_, format_))
    for layer, (text, images) in enumerate(counts):
        core = np.zeros(images, dtype=np.bool_)
        rows.fill(layer, np.arange(text, dtype=np.int32), 100 + np.arange(images, dtype=np.int32), core, 0)
    for layer, (text, images) in enumerate(counts):
        rows.keep_text(random.random((1, text)) < share, layer)
        rows.keep_image(random.random((1, images)) < share, layer)
    old = [(each.text_ids, each.image_ids) for each in rows]
    carried = {}
    for _, before, after in compact(rows):
        carried = dict(zip(before.tolist(), after.tolist(), strict=True))
    assert not set(carried) & set(carried.values())
    for each, ids in zip(rows, old, strict=True):
        for new, own in zip((each.text_ids, each.image_ids), ids, strict=True):
            assert new.tolist() == [carried.get(row, row) for row in own.tolist()], "each row by its new id"
    pool.check_integrity([rows])
    count = sum(len(each.text_ids) + len(each.image_ids) for each in rows)
    assert rows.lease.held == -(-count // pool.packing(format_).rows)


def test_pages_are_given_back_once_and_only_free_ones() -> None:
    pool = RowPool(10, SHAPE)
    lease = pool.lease(6)
    first, second = pool.allocate(3 * PAGE_ROWS, lease), pool.allocate(2 * PAGE_ROWS, lease)
    assert pool.take_dirty_pages().tolist() == []
    pool.release(first, lease)
    assert pool.take_dirty_pages().tolist() == [0, 1, 2]
    assert pool.take_dirty_pages().tolist() == []
    pool.release(pool.allocate(1, lease), lease)
    pool.release(second, lease)
    assert pool.take_dirty_pages().tolist() == [0, 3, 4]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux takes the advice as an order")
@given(pages=st.sets(st.integers(0, 19)))
def test_rows_beside_what_was_given_back_are_untouched(pages: set[int]) -> None:
    assume(pages)
    shape = KvShape(1, 4, 64, 4)  # a page's keys are four pages of the system's
    store = RowStore(20, shape, torch.float32)
    store.keys[:], store.values[:] = 1, 2
    back = store.give_back(np.array(sorted(pages), dtype=np.int64))
    assert 0 < back <= len(pages) * PAGE_ROWS * shape.row_bytes
    keys, values = store.keys.view(20, -1), store.values.view(20, -1)
    stay = sorted(set(range(20)) - pages)
    assert bool((keys[stay] == 1).all())
    assert bool((values[stay] == 2).all())
    store.keys[:], store.values[:] = 3, 4
    assert bool((keys == 3).all())
    assert bool((values == 4).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux takes the advice as an order")
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_format_outlive_what_is_given_back_beside_them(name: str) -> None:
    """Those of one lease between those of another, which ends: also records of a key and a value in either arena."""
    shape = KvShape(1, 4, 64, 4)
    pool = RowPool(12, shape)
    store = RowStore(pool.pages, shape, torch.float32)
    leases = pool.lease(6), pool.lease(6)
    rows = pool.packing(name).rows
    stays, goes = (
        torch.from_numpy(np.concatenate(ids)).long()
        for ids in zip(*[[pool.allocate(rows, lease, name) for lease in leases] for _ in range(6)], strict=True)
    )
    size = (len(stays), shape.kv_heads, shape.head_dim)
    for ids in (stays, goes):
        store.write(ids, torch.rand(size) + 1, torch.rand(size) + 1, name)
    expected = store.read(stays, name)
    pool.release_all(leases[1])
    pages = pool.take_dirty_pages()
    back = store.give_back(pages)
    assert 0 < back <= 6 * pool.page_bytes
    assert back >= 4 * pool.page_bytes, "all but what no whole page of the system's is"
    assert all(map(torch.equal, store.read(stays, name), expected))


def test_memory_that_is_no_whole_page_is_not_given_back() -> None:
    block = np.ones(100, dtype=np.uint8)
    begin = block.ctypes.data
    assert advise_free(begin, begin + 100) == 0
    assert bool((block == 1).all())


_RESIDENT = """
import sys
import numpy as np, torch
from avl_edge.machine import allocator
from avl_edge.config import KvShape
from avl_edge.kv.pool import RowPool
from avl_edge.kv.store import RowStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

allocator.bound()
shape = KvShape(4, 4, 64, 4)
pool = RowPool(4096, shape)
store = RowStore(pool.pages, shape, torch.float32)
lease = pool.lease(pool.pages)
before = resident()
ids = pool.allocate(pool.pages * 16, lease)
store.keys[:], store.values[:] = 1, 1
full = resident()
pool.release(ids[len(ids) // 4:], lease)
back = store.give_back(pool.take_dirty_pages()) // 2**20
print(full - before, full - resident(), back, float(store.keys[:len(ids) // 4].mean()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_process_becomes_smaller_by_what_it_gives_back() -> None:
    root = ROOT
    done = subprocess.run([sys.executable, "-c", _RESIDENT], cwd=root, check=True, capture_output=True, timeout=120)
    grown, given, said, kept = map(float, done.stdout.split())
    assert grown == pytest.approx(128, abs=8)
    assert given == pytest.approx(96, abs=8)
    assert said == pytest.approx(given, abs=8)
    assert kept == 1
