"""Rows that change their format, many layers at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avl_edge import Formats
from avl_edge.backends import stored
from avl_edge.backends.stored import StoredRows
from avl_edge.config import KvShape
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import Format
from avl_edge.kv.methods import Avl
from avl_edge.kv.pool import RowPool
from avl_edge.kv.pool.compaction import smaller_formats
from avl_edge.kv.smoothing import Smoothing
from avl_edge.kv.store import RowStore
from avl_edge.model.network.rope import Rope, rotate
from avl_edge.request import ImageSpan
from tests.equipment.settled import settle

SHAPE = KvShape(layers=6, kv_heads=2, head_dim=32, itemsize=4)
LENGTH, SPANS, STEPS = 60, (ImageSpan("", 2, 50),), 5
FORMATS = [
    Formats("exact", "exact", "int4"),
    Formats("int8/int4", "int8", "int8/int4"),
    Formats("exact", "int4", "lowrank:8"),
]


def no_rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(len(positions), 1, SHAPE.head_dim), torch.zeros(len(positions), 1, SHAPE.head_dim)


def life(monkeypatch: pytest.MonkeyPatch, formats: Formats, at_once: int) -> tuple[list[Tensor], list[int]]:
    """What every row of a sequence holds after some steps, each of which ranks the image rows anew; and the number of
    reads and writes of each step, once its new rows are there."""
    monkeypatch.setattr(stored, "BYTES_AT_ONCE", at_once)
    counts: Counter[str] = Counter()
    for name in ("read", "write"):
        original = getattr(RowStore, name)

        def counted(*arguments: Any, original: Any = original, name: str = name) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(RowStore, name, counted)
    plan = kv_plan(Avl(secondary=90, core=40, refresh=1), formats, SHAPE, prompt_shape(LENGTH, SPANS), STEPS)
    pool = RowPool(plan.pages, SHAPE)
    store = RowStore(pool.pages, SHAPE, torch.float32)
    rows = StoredRows(store, no_rope)
    cache = SequenceCache(pool, plan, LENGTH, SPANS, SHAPE.layers)
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    truth = torch.randn(SHAPE.layers, 2, LENGTH + STEPS, 2, 32, generator=generator)
    for layer in range(SHAPE.layers):
        keys, values = truth[layer][:, cache.positions(layer)]
        scores = random.random(len(keys))
        rows.store_prompt(cache, layer, cache.store_prompt(layer, scores, scores), keys, values)
        cache.prune_prompt(layer, scores, scores)
    steps = []
    for _ in range(STEPS):
        position, slots = cache.begin_step()
        for layer in range(SHAPE.layers):
            rows.append([cache], slots[layer : layer + 1].tolist(), *truth[layer][:, [position]])
        read = [sum(len(each) for each in cache.rows_to_read(layer)) for layer in range(SHAPE.layers)]
        counts.clear()
        rows.move(cache, settle(cache, [random.random(count) for count in read]))
        steps.append(counts.total())
    held = []
    for layer in range(SHAPE.layers):
        smoothing = Smoothing(*store.read(torch.from_numpy(cache.rows.smoothing[layer : layer + 1]).long()))
        for each in cache.rows_to_read(layer):
            if "lowrank" in each.format:
                held += store.read_records(torch.from_numpy(each.ids).long(), Format(each.format))
                continue
            keys, values = store.read(torch.from_numpy(each.ids).long(), each.format)
            held += [smoothing.original(keys), values]
            error = torch.stack(held[-2:]) - truth[layer][:, each.positions]
            assert "lowrank" in str(formats) or error.abs().max() < 1, "no row has become another"
    return held, steps


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_layers_are_converted_together_as_one_by_one(monkeypatch: pytest.MonkeyPatch, formats: Formats) -> None:
    """Rows that one layer left are where another's go: all are read before."""
    with monkeypatch.context() as patch:
        expected, one_by_one = life(patch, formats, 1)
    with monkeypatch.context() as patch:
        some, in_between = life(patch, formats, 30 * SHAPE.row_bytes)
    with monkeypatch.context() as patch:
        found, together = life(patch, formats, 2**40)
    for other in (some, found):
        for ours, theirs in zip(other, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert max(together) <= min(in_between) <= max(in_between) <= min(one_by_one)
    if "lowrank" not in formats.secondary:
        assert max(together) == 4, "both ways between two formats: a read and a write each"


ROPE = Rope(SHAPE.head_dim, {"rope_type": "default", "rope_theta": 10000.0})


@pytest.mark.parametrize("secondary", [60, 100])
def test_rows_that_stay_exact_are_smoothed_with_the_first_that_are_packed(secondary: int) -> None:
    """A-VL's secondary rows under pressure: text and core stay exact, in keys that are all changed alike, so that the
    packed ones lose less than keys with biases would; and a sequence is smoothed once."""
    plan = kv_plan(Avl(100, secondary, 30), Formats(), SHAPE, prompt_shape(LENGTH, SPANS), STEPS)
    pool = RowPool(plan.pages, SHAPE)
    store = RowStore(pool.pages, SHAPE, torch.float32)
    rows = StoredRows(store, lambda positions: ROPE.angles(positions, torch.float32))
    cache = SequenceCache(pool, plan, LENGTH, SPANS, SHAPE.layers)
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    truth = torch.randn(SHAPE.layers, 2, LENGTH, 2, 32, generator=generator)
    truth[:, 0, ..., ::8] += 40 * torch.randn(SHAPE.layers, 1, 2, 4, generator=generator)
    for keys in truth[:, 0]:
        keys[:] = rotate(keys, *ROPE.angles(torch.arange(LENGTH), torch.float32))
    for layer in range(SHAPE.layers):
        scores = random.random(LENGTH)
        rows.store_prompt(cache, layer, cache.store_prompt(layer, scores, scores), *truth[layer])
    assert rows.smoothings([cache]) is None
    smoothed = []
    for packed in ("int8", "int8/int4"):
        smaller = smaller_formats(cache.formats, False, SHAPE)
        assert smaller == Formats("exact", "exact", packed)
        assert rows.demote(cache, smaller)
        pool.check_integrity([cache.rows])
        smoothed.append(rows.smoothings([cache]))
        for layer, held in enumerate(cache.rows):
            smoothing = Smoothing(*store.read(torch.from_numpy(cache.rows.smoothing[layer : layer + 1]).long()))
            assert float(smoothing.scale.min()) < 0.5 < float(smoothing.scale.max()) == 1
            tiers = (
                ("exact", held.text_ids, held.text_positions),
                ("exact", held.image_ids[held.core], held.image_positions[held.core]),
                (packed, held.image_ids[~held.core], held.image_positions[~held.core]),
            )
            for name, ids, positions in tiers:
                assert len(ids)
                keys, values = store.read(torch.from_numpy(ids).long(), name)
                true_keys, true_values = truth[layer][:, positions]
                plain = decode(Format("int8"), encode(Format("int8"), true_keys), 2, 32)
                most = 1e-4 if name == "exact" else 0.5 * float((plain - true_keys).abs().mean())
                assert float((smoothing.original(keys) - true_keys).abs().mean()) < most
                assert name != "exact" or torch.equal(values, true_values)
    first, second = smoothed
    assert first is not None
    assert second is not None
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.center, other.center)
        assert torch.equal(one.scale, other.scale)
