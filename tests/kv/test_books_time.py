"""What the books cost grows with what there is to do, and not with what could be walked through: ratios of times of one
thread, each the least of several, far from where they would be otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.kv.books.native import library
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import Avl, Full, Method, Streaming
from avl_edge.kv.pool import RowPool, SequenceRows
from avl_edge.kv.selection import ListedRows, StepScores
from avl_edge.request import ImageSpan

PAGES, LAYERS = 2000, 4
SHAPE = KvShape(LAYERS, kv_heads=8, head_dim=64, itemsize=2)


def _least(times: int, prepare: Callable[[], Callable[[], object]]) -> float:
    """Seconds of what ``prepare`` gives, at its fastest."""
    found = []
    for _ in range(times):
        work = prepare()
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


def _closing(format_: str) -> tuple[float, int]:
    """How long a sequence that fills the pool takes to close, and how many rows it had. Its tables' memory goes back to
    the system later."""
    pool = RowPool(PAGES, SHAPE)
    tables: list[object] = []
    count = PAGES * pool.packing(format_).rows // LAYERS

    def filled() -> Callable[[], object]:
        rows = SequenceRows(pool, LAYERS, PAGES, Formats("exact", format_, format_))
        positions = np.arange(count, dtype=np.int32)
        for layer in range(LAYERS):
            rows.fill(layer, positions[:0], positions, np.ones(count, dtype=np.bool_), 0)
        tables[:] = [rows.text, rows.image, *rows.lease.shares.values()]
        return rows.close

    return _least(5, filled), count * LAYERS


def test_a_sequence_closes_in_a_time_that_depends_on_its_pages() -> None:
    """As many pages with sixteen times the rows in them: close to the same, where a walk would take sixteen times."""
    (exact, rows), (packed, more) = _closing("exact"), _closing("lowrank:32")
    assert more == 16 * rows
    assert packed < 4 * exact


def _begun(method: Method, formats: Formats, layers: int, random: np.random.Generator) -> SequenceCache:
    """A sequence with few rows in each layer, behind its prompt."""
    shape, prompt = KvShape(layers, 2, 16, 2), PromptShape(4, 40, 8)
    plan = kv_plan(method, formats, shape, prompt, 40)
    cache = SequenceCache(RowPool(plan.pages, shape), plan, prompt.length, [ImageSpan("", 4, 40)], layers)
    for layer in range(layers):
        scores = random.random(len(cache.positions(layer)))
        cache.store_prompt(layer, scores, scores)
        cache.prune_prompt(layer, scores, scores)
    return cache


def _step(method: Method, layers: int) -> float:
    """What a step's books take of one sequence with few rows in each of many layers."""
    random = np.random.default_rng(0)
    cache = _begun(method, Formats(), layers, random)
    weights = random.random((layers, 64), dtype=np.float32)

    def prepared() -> Callable[[], object]:
        def step() -> None:
            cache.begin_step()
            read = cache.rows_read_now
            scores = StepScores(read, np.float32) if cache.wants_scores else None
            if scores:
                scores.give([0, 0], np.zeros((layers, 1), dtype=np.int32), weights)
            cache.settle(scores)

        return step

    return _least(36, prepared)


@pytest.mark.skipif(library() is None, reason="numpy goes layer by layer")
@pytest.mark.parametrize("method", [Full(), Avl(refresh=1, text_floor=4), Streaming(4, 30)], ids=lambda each: each.name)
def test_a_steps_books_are_not_kept_layer_by_layer(method: Method) -> None:
    """Of sixteen times the layers with few rows each: less than four times as long."""
    assert _step(method, 64) < 4 * _step(method, 4)


def test_asking_which_rows_a_step_reads_changes_nothing() -> None:
    """Neither its statistics, nor what comes after."""
    counted = []
    for asks in (0, 3):
        random = np.random.default_rng(0)
        cache = _begun(Avl(), Formats("exact", "exact", "int4"), LAYERS, random)
        for _ in range(12):
            cache.begin_step()
            before = (cache.rows_read, cache.rows_full, cache.bytes_read)
            for _ in range(asks):
                for layer in range(LAYERS):
                    cache.rows_to_read(layer)
                    cache.rows_scanned_now.of(layer)
            assert (cache.rows_read, cache.rows_full, cache.bytes_read) == before
            scores = StepScores(read := cache.rows_read_now, np.float64)
            for layer in range(LAYERS):
                listed = ListedRows([read], layer)
                listed.give(scores, 0, random.random(listed.rows.shape[1]))
            cache.settle(scores)
        held = [(rows.text_ids.tolist(), rows.image_ids.tolist(), rows.core.tolist()) for rows in cache.rows]
        counted.append((cache.rows_read, cache.rows_full, cache.bytes_read, held))
    assert counted[0] == counted[1]
    assert counted[0][0] > 0
