"""A pool, its store and requests on their way, from which memory is asked back: no model, random rows and scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from avl_edge.backends.stored import StoredRows
from avl_edge.config import Formats, KvShape, Options
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.methods import Method
from avl_edge.kv.pool import RowPool
from avl_edge.kv.smoothing import Smoothing
from avl_edge.kv.store import RowStore
from avl_edge.machine.pressure import Action
from avl_edge.request import ImageSpan, Prompt
from avl_edge.serving.memory_pressure import MemoryPressureHandler
from avl_edge.serving.requests import Request, Running
from avl_edge.serving.schedule_policy import Advance
from avl_edge.serving.scheduler import Scheduler
from tests.equipment.prompts_first import PromptsFirst
from tests.equipment.random_methods import LAYERS
from tests.equipment.settled import by_layer, settle_at_random

SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=4)
SIZE = {"exact": 0, "int8": 1, "int8/int4": 2, "int4": 3}

Ids = npt.NDArray[np.int32]
Rows = tuple[Tensor, Tensor]


class ScriptedMonitor:
    """A monitor that says what it is told to, as a real one would: in order."""

    is_due = True
    most_wait_s = 60.0

    def __init__(self) -> None:
        self.short = False
        self.last = Action.FREE

    def poll(self, gives: Callable[[], tuple[bool, bool]]) -> Action:
        can_demote, can_evict = gives()
        level = Action.DEMOTE if can_demote else Action.EVICT if can_evict else Action.HOLD
        self.last = level if self.short else Action.FREE
        return self.last

    def describe(self) -> str:
        return "as told"


def request_for(method: Method, formats: Formats, prefix: int, images: int, text: int, steps: int) -> Request:
    spans = (ImageSpan("", prefix, images),) if images else ()
    prompt = Prompt((0,) * (prefix + images + text), spans, None)
    plan = kv_plan(method, formats, SHAPE, prompt_shape(len(prompt), spans), steps)
    return Request(prompt, Options(), plan, steps + 1)


def _as_it_is(keys: torch.Tensor, *_: object) -> Smoothing:
    """What is read is what was written: that keys are smoothed is no matter here, but the rows that this takes are."""
    return Smoothing(torch.zeros_like(keys[0]), torch.ones_like(keys[0]))


class Harness:
    """A pool, its store and requests on their way, driven like the runtime drives them, on random rows and scores.

    ``known`` has what every row of every request must read as: what was written, through each format it has been in.
    """

    def __init__(self, pages: int) -> None:
        self.pool = RowPool(pages, SHAPE)
        self.store = RowStore(pages, SHAPE, torch.float32)
        self.rows = StoredRows(self.store, lambda positions: (positions, positions), _as_it_is)
        self.scheduler = Scheduler(self.pool, LAYERS, PromptsFirst())
        self.monitor = ScriptedMonitor()
        self.handler = MemoryPressureHandler(self.monitor, self.pool, self.rows, self.scheduler)  # type: ignore[arg-type]
        self.known: dict[Running, list[dict[int, Rows]]] = {}
        self.left: dict[Running, int] = {}
        self.random = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)

    def _rows(self, count: int) -> Rows:
        size = (count, SHAPE.kv_heads, SHAPE.head_dim)
        return torch.randn(size, generator=self.torch), torch.randn(size, generator=self.torch)

    def _through(self, format_: str, rows: Rows) -> Rows:
        """What rows read as once they have been stored in a format."""
        scratch = RowStore(-(-len(rows[0]) // 4) + 1, SHAPE, torch.float32)
        pool = RowPool(scratch.keys.shape[0] // PAGE_ROWS, SHAPE)
        ids = torch.from_numpy(pool.allocate(len(rows[0]), pool.lease(pool.pages), format_).astype(np.int64))
        scratch.write(ids, *rows, format_)
        return scratch.read(ids, format_)

    def _know(self, sequence: Running, layer: int, format_: str, positions: Ids, rows: Rows) -> None:
        keys, values = self._through(format_, rows)
        known = self.known[sequence][layer]
        known.update({at: (keys[i], values[i]) for i, at in enumerate(positions.tolist())})

    def admit(self, request: Request) -> Running | None:
        sequence = Running(request, None, None)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        choice = self.scheduler.next(0.0)
        if not isinstance(choice, Advance) or choice.sequence is not sequence:
            self.scheduler.remove(sequence)
            return None
        cache, m = self.scheduler.admit(sequence), len(request.prompt)
        self.scheduler.start(sequence)
        self.known[sequence] = [{} for _ in range(LAYERS)]
        for layer in range(LAYERS):
            keys, values = self._rows(m)
            scores = self.random.random(m)
            stored = cache.store_prompt(layer, scores, scores, scores)
            self.rows.store_prompt(cache, layer, stored, keys, values)
            for each in stored:
                self._know(sequence, layer, each.format, each.positions, (keys[each.order], values[each.order]))
            survivors = cache.prune_prompt(layer, scores, scores, scores)
            m = m if survivors is None else len(survivors)
        self.left[sequence] = request.max_new_tokens - 1
        return sequence

    def step(self, sequence: Running) -> None:
        self.left[sequence] -= 1
        cache = cache_of(sequence)
        position, ids = cache.begin_step()
        for layer in range(LAYERS):
            rows = self._rows(1)
            self.rows.append([cache], [int(ids[layer])], *rows)
            self._know(sequence, layer, cache.formats.text, np.array([position], dtype=np.int32), rows)
        for layer in range(LAYERS):
            for each in cache.rows_to_read(layer):
                self._check(sequence, layer, each.format, each.ids, each.positions)
        moved = settle_at_random(cache, self.random)
        self.rows.move(cache, moved)
        for layer, of_layer in by_layer(moved, LAYERS):
            for move in of_layer:
                self._know_again(sequence, layer, move.new_format, move.positions)

    def _know_again(self, sequence: Running, layer: int, format_: str, positions: Ids) -> None:
        if len(positions):
            known = [self.known[sequence][layer][at] for at in positions.tolist()]
            keys, values = (torch.stack(each) for each in zip(*known, strict=True))
            self._know(sequence, layer, format_, positions, (keys, values))

    def _check(self, sequence: Running, layer: int, format_: str, ids: Ids, positions: Ids) -> None:
        if not len(ids):
            return
        keys, values = self.store.read(torch.from_numpy(ids.astype(np.int64)), format_)
        for at, key, value in zip(positions.tolist(), keys, values, strict=True):
            known = self.known[sequence][layer][at]
            assert torch.equal(key, known[0]), f"row {at} of layer {layer} is not what was stored in {format_}"
            assert torch.equal(value, known[1])

    def check(self) -> None:
        running = self.scheduler.running
        self.pool.check_integrity([cache_of(each).rows for each in running])
        assert sum(cache_of(each).rows.lease.limit for each in running) <= self.pool.pages
        for sequence in running:
            formats = cache_of(sequence).formats
            for layer, rows in enumerate(cache_of(sequence).rows):
                assert np.all(np.diff(rows.image_positions) > 0)
                self._check(sequence, layer, formats.text, rows.text_ids, rows.text_positions)
                for name, tier in ((formats.core, rows.core), (formats.secondary, ~rows.core)):
                    self._check(sequence, layer, name, rows.image_ids[tier], rows.image_positions[tier])

    def escalate(self, short: bool = True) -> Action:
        """A check while memory is short, or no longer; what changed must be what was said."""
        self.monitor.short = short
        before = {each: _Before(cache_of(each)) for each in self.scheduler.running}
        self.handler.check(fail)
        for sequence, was in before.items():
            cache = cache_of(sequence)
            for tier, old in was.formats.by_tier().items():
                new = cache.formats.by_tier()[tier]
                assert SIZE[old] <= SIZE[new]  # more than one smaller, where the one between would save no page
                assert old == new or self.monitor.last is Action.DEMOTE
                if new != old and tier != "text":
                    for layer, rows in enumerate(cache.rows):
                        chosen = rows.core if tier == "core" else ~rows.core
                        self._know_again(sequence, layer, new, rows.image_positions[chosen])
            was.check(cache, self.monitor.last)
        return self.monitor.last

    def end(self, sequence: Running) -> None:
        self.scheduler.remove(sequence)
        del self.known[sequence], self.left[sequence]


class _Before:
    """What a request held before an escalation."""

    def __init__(self, cache: SequenceCache) -> None:
        self.formats, self.limit, self.pages = cache.formats, cache.rows.lease.limit, cache.rows.lease.held
        self.rows = [rows.counts() for rows in cache.rows]
        self.can_evict = cache.can_evict

    def check(self, cache: SequenceCache, action: Action) -> None:
        lease, rows = cache.rows.lease, [each.counts() for each in cache.rows]
        assert lease.held <= lease.limit <= self.limit, "a promise grew"
        assert lease.held <= self.pages
        if action is Action.EVICT and self.can_evict:
            assert sum(each["secondary"] for each in rows) < sum(each["secondary"] for each in self.rows)
            assert [each["core"] for each in rows] == [each["core"] for each in self.rows]
        else:
            assert rows == self.rows
        if action in (Action.FREE, Action.HOLD):
            assert (lease.limit, lease.held, cache.formats) == (self.limit, self.pages, self.formats)


def fail(_: Running, error: BaseException) -> None:
    raise error


def cache_of(sequence: Running) -> SequenceCache:
    assert sequence.cache is not None
    return sequence.cache
