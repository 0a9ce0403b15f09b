"""Requests that give rows up while they run: the pool's books, the rows' contents, and the memory itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from avl_edge.allocator import advise_free
from avl_edge.budget import kv_plan
from avl_edge.cache import SequenceCache, prompt_shape
from avl_edge.config import Formats, KvShape, Options, PromptShape
from avl_edge.layout import PAGE_ROWS
from avl_edge.policies import H2O, Avl, Coarse, Full, Method, Streaming
from avl_edge.policies.base import PromptLayer, StepLayer
from avl_edge.pool import RowPool, RowStore, SequenceRows
from avl_edge.pool.smaller import Demotion, smaller_formats
from avl_edge.pressure import Action
from avl_edge.relief import Relief
from avl_edge.request import ImageSpan, Prompt
from avl_edge.scheduler import Request, Running, Scheduler
from avl_edge.stored import StoredRows

LAYERS = 3
SHAPE = KvShape(LAYERS, kv_heads=2, head_dim=16, itemsize=4)
NAMES = ("exact", "int8", "int4")
SIZE = {"exact": 0, "int8": 1, "int4": 2}

Ids = npt.NDArray[np.int32]
Rows = tuple[Tensor, Tensor]


def _methods() -> st.SearchStrategy[Method]:
    percent = st.integers(1, 100)
    triple = st.tuples(percent, percent, percent).map(lambda values: sorted(values, reverse=True))
    avl = st.builds(
        lambda psc, k, t: Avl(*map(float, psc), refresh=k, text_keep=t, text_floor=2, prune_layer=1),
        triple,
        st.integers(0, 3),
        percent,
    )
    coarse = st.builds(lambda sc, mass: Coarse(max(sc), min(sc), mass), st.tuples(percent, percent), percent)
    h2o = st.builds(H2O, budget=percent, heavy=st.integers(0, 100), grow=st.integers(0, 1))
    streaming = st.builds(Streaming, sinks=st.integers(0, 8), window=st.integers(1, 60))
    return st.one_of(st.just(Full()), avl, avl, avl, coarse, h2o, streaming)


@st.composite
def _choices(draw: st.DrawFn) -> tuple[Method, Formats]:
    method, names = draw(_methods()), st.sampled_from(("exact", *NAMES))
    core = draw(names)
    return method, Formats(draw(names), core, core if isinstance(method, Coarse) else draw(names))


class Says:
    """A monitor that says what it is told to, as a real one would: in order."""

    is_due = True

    def __init__(self) -> None:
        self.short = False
        self.last = Action.FREE

    def look(self, gives: Callable[[], tuple[bool, bool]]) -> Action:
        can_demote, can_evict = gives()
        notch = Action.DEMOTE if can_demote else Action.EVICT if can_evict else Action.HOLD
        self.last = notch if self.short else Action.FREE
        return self.last

    def describe(self) -> str:
        return "as told"


def _request(method: Method, formats: Formats, prefix: int, images: int, text: int, steps: int) -> Request:
    spans = (ImageSpan("", prefix, images),) if images else ()
    prompt = Prompt((0,) * (prefix + images + text), spans, None)
    plan = kv_plan(method, formats, SHAPE, prompt_shape(len(prompt), spans), steps)
    return Request(prompt, Options(), plan, steps + 1)


class Desk:
    """A pool, its store and requests on their way, driven like the runtime drives them, on random rows and scores.

    ``known`` has what every row of every request must read as: what was written, through each format it has been in.
    """

    def __init__(self, pages: int) -> None:
        self.pool = RowPool(pages, SHAPE)
        self.store = RowStore(pages, SHAPE, torch.float32)
        self.rows = StoredRows(self.store, lambda positions: (positions, positions))
        self.scheduler = Scheduler(self.pool, LAYERS)
        self.monitor = Says()
        self.relief = Relief(self.monitor, self.pool, self.rows, self.scheduler)  # type: ignore[arg-type]
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
        work = self.scheduler.next()
        if work is None or work.sequences != (sequence,) or not work.prefill:
            self.scheduler.remove(sequence)
            return None
        cache, m = self.scheduler.admit(sequence), len(request.prompt)
        self.known[sequence] = [{} for _ in range(LAYERS)]
        for layer in range(LAYERS):
            keys, values = self._rows(m)
            scores = self.random.random(m)
            stored = cache.store_prompt(layer, scores, scores, scores)
            self.rows.store_prompt(cache, layer, stored, keys, values)
            for each in stored:
                self._know(sequence, layer, each.format, each.positions, (keys[each.places], values[each.places]))
            survivors = cache.prune_prompt(layer, scores, scores, scores)
            m = m if survivors is None else len(survivors)
        self.left[sequence] = request.max_new_tokens - 1
        return sequence

    def step(self, sequence: Running) -> None:
        self.left[sequence] -= 1
        cache = _cache(sequence)
        position, ids = cache.begin_step()
        for layer in range(LAYERS):
            rows = self._rows(1)
            self.rows.append([cache], [int(ids[layer])], *rows)
            self._know(sequence, layer, cache.formats.text, np.array([position], dtype=np.int32), rows)
            if cache.picks_core:
                (looked_at,) = cache.rows_to_look_at(layer)
                cache.pick_core(layer, self.random.random(len(looked_at.ids)))
            read = cache.rows_to_read(layer)
            for each in read:
                self._check(sequence, layer, each.format, each.ids, each.positions)
            count = sum(len(each.ids) for each in read)
            moved = cache.settle(layer, self.random.random(count) if cache.wants_scores else None)
            self.rows.move(cache, layer, moved)
            for move in moved:
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
        self.pool.check_integrity([_cache(each).rows for each in running])
        assert sum(_cache(each).rows.lease.limit for each in running) <= self.pool.pages
        for sequence in running:
            formats = _cache(sequence).formats
            for layer, rows in enumerate(_cache(sequence).rows):
                assert np.all(np.diff(rows.image_positions) > 0)
                self._check(sequence, layer, formats.text, rows.text_ids, rows.text_positions)
                for name, tier in ((formats.core, rows.core), (formats.secondary, ~rows.core)):
                    self._check(sequence, layer, name, rows.image_ids[tier], rows.image_positions[tier])

    def notch(self, short: bool = True) -> Action:
        """A check while memory is short, or no longer; what changed must be what was said."""
        self.monitor.short = short
        before = {each: _Before(_cache(each)) for each in self.scheduler.running}
        self.relief.check(_fail)
        for sequence, was in before.items():
            cache = _cache(sequence)
            for tier, old in was.formats.by_tier().items():
                new = cache.formats.by_tier()[tier]
                assert SIZE[old] <= SIZE[new] <= SIZE[old] + (self.monitor.last is Action.DEMOTE)
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
    """What a request held before a notch."""

    def __init__(self, cache: SequenceCache) -> None:
        self.formats, self.limit, self.pages = cache.formats, cache.rows.lease.limit, cache.rows.lease.held
        self.rows = [rows.counts() for rows in cache.rows]
        self.spare = cache.can_spare

    def check(self, cache: SequenceCache, action: Action) -> None:
        lease, rows = cache.rows.lease, [each.counts() for each in cache.rows]
        assert lease.held <= lease.limit <= self.limit, "a promise grew"
        assert lease.held <= self.pages
        if action is Action.EVICT and self.spare:
            assert sum(each["secondary"] for each in rows) < sum(each["secondary"] for each in self.rows)
            assert [each["core"] for each in rows] == [each["core"] for each in self.rows]
        else:
            assert rows == self.rows
        if action in (Action.FREE, Action.HOLD):
            assert (lease.limit, lease.held, cache.formats) == (self.limit, self.pages, self.formats)


def _fail(_: Running, error: BaseException) -> None:
    raise error


def _cache(sequence: Running) -> SequenceCache:
    assert sequence.cache is not None
    return sequence.cache


class PressureLife(RuleBasedStateMachine):
    """Admissions, steps, notches, recoveries and ends over one small pool. Every row reads as it must, always."""

    @initialize(pages=st.integers(6, 60))
    def open(self, pages: int) -> None:
        self.desk = Desk(pages)

    @rule(
        choice=_choices(),
        prefix=st.integers(0, 6),
        images=st.integers(0, 60),
        text=st.integers(1, 8),
        steps=st.integers(0, 12),
    )
    def admit(self, choice: tuple[Method, Formats], prefix: int, images: int, text: int, steps: int) -> None:
        request = _request(*choice, prefix, images, text, steps)
        room = request.plan.pages <= self.desk.pool.pages_unreserved and not self.desk.scheduler.is_held
        assert (self.desk.admit(request) is not None) == room

    @precondition(lambda self: any(self.desk.left.values()))
    @rule(choice=st.integers(0, 10**6))
    def step(self, choice: int) -> None:
        ready = [each for each, left in self.desk.left.items() if left]
        self.desk.step(ready[choice % len(ready)])

    @rule()
    def memory_is_short(self) -> None:
        action = self.desk.notch()
        assert (action is Action.HOLD) == self.desk.scheduler.is_held or self.desk.scheduler.is_held

    @rule()
    def there_is_memory_again(self) -> None:
        self.desk.notch(short=False)
        assert not self.desk.scheduler.is_held

    @precondition(lambda self: bool(self.desk.scheduler.running))
    @rule(choice=st.integers(0, 10**6))
    def end(self, choice: int) -> None:
        running = self.desk.scheduler.running
        self.desk.end(running[choice % len(running)])

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "desk"):
            self.desk.check()

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            for sequence in self.desk.scheduler.running:
                while self.desk.left[sequence]:
                    self.desk.step(sequence)  # nobody who was admitted ever finds the pool empty
                self.desk.check()
                self.desk.end(sequence)
            self.desk.pool.check_integrity([])
            assert self.desk.pool.pages_unreserved == self.desk.pool.pages


PressureLife.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPressureLife = PressureLife.TestCase


@settings(max_examples=80, deadline=None)
@given(
    choice=_choices(),
    prefix=st.integers(0, 10),
    images=st.integers(1, 80),
    text=st.integers(1, 10),
    steps=st.integers(0, 20),
    at=st.integers(0, 20),
)
def test_under_pressure_to_the_end_a_request_gives_all_it_can_and_still_ends(
    choice: tuple[Method, Formats], prefix: int, images: int, text: int, steps: int, at: int
) -> None:
    """In a pool that is exactly the promise: no room to spare on the way. A format that would save no page is left out
    until it would."""
    request = _request(*choice, prefix, images, text, steps)
    desk = Desk(request.plan.pages)
    sequence = desk.admit(request)
    assert sequence is not None
    for _ in range(min(at, steps)):
        desk.step(sequence)
    actions = []
    while not actions or actions[-1] is not Action.HOLD:
        smaller = desk.relief._smaller(sequence)
        actions.append(desk.notch())
        assert (actions[-1] is Action.DEMOTE) == (smaller is not None)
        desk.check()
    assert desk.notch() is Action.HOLD
    assert not _cache(sequence).can_spare
    assert sequence.pressure.demotions == actions.count(Action.DEMOTE) <= 2
    assert (sequence.pressure.rows_evicted > 0) == (Action.EVICT in actions)
    while desk.left[sequence]:
        desk.step(sequence)
    desk.check()


def test_a_lease_shrinks_to_what_may_still_come_and_others_get_the_rest() -> None:
    """Full attention over 60 image tokens: the plan of a second one that did not fit beside it does now."""
    request = _request(Full(), Formats(), 4, 60, 4, 8)
    desk = Desk(request.plan.pages + request.plan.pages // 2)
    first = desk.admit(request)
    assert first is not None
    assert desk.admit(request) is None
    assert [desk.notch(), desk.notch(), desk.notch()] == [Action.DEMOTE, Action.DEMOTE, Action.HOLD]
    assert _cache(first).formats == Formats("exact", "int4", "int4")
    packed = kv_plan(Full(), Formats("exact", "int4", "int4"), SHAPE, PromptShape(4, 60, 4), 8)
    assert _cache(first).rows.lease.limit == packed.pages < request.plan.pages / 2
    desk.notch(short=False)
    second = desk.admit(request)
    assert second is not None
    assert second.pressure.demotions == 0
    assert _cache(second).formats == Formats()
    desk.check()


def test_a_full_lease_has_room_for_the_change() -> None:
    """Every row of its three pages is held: the first layer's rows alone would leave no page before they need one."""
    request = _request(Full(), Formats(), 0, 12, 4, 0)
    desk = Desk(request.plan.pages)
    sequence = desk.admit(request)
    assert sequence is not None
    lease = _cache(sequence).rows.lease
    assert (lease.held, lease.limit) == (3, 3)
    change = Demotion(_cache(sequence).rows, Formats("exact", "int8", "int8"))
    assert change.batches() == [[0, 1], [2]]
    assert desk.notch() is Action.DEMOTE
    desk.check()
    assert (lease.held, lease.limit) == (2, 2)


def test_avl_gives_the_rows_that_its_last_refresh_scored_lowest() -> None:
    policy = Avl(90, 50, 20, refresh=2).policy(PromptShape(1, 10, 1), 1)
    scores = np.array([0, 5, 4, 9, 8, 1, 0, 0, 7, 0, 0, 0], dtype=np.float32)
    is_image = np.array([False] + [True] * 10 + [False])
    is_suffix = np.array([False] * 11 + [True])
    kept = policy.keep_prompt(PromptLayer(0, np.arange(12, dtype=np.int32), is_image, is_suffix, scores, scores))
    assert np.flatnonzero(kept.stored & is_image).tolist() == [1, 2, 3, 4, 8]
    core = kept.core[kept.stored & is_image]
    assert core.tolist() == [False, False, True, True, False]
    assert policy.spare(0, core) == 3
    assert policy.give_up(0, core, 1).tolist() == [True, False, True, True, True]
    texts = np.array([1, 1, 1], dtype=np.float32), np.array([False, True, True])
    refreshed = policy.settle(StepLayer(0, 2, np.array([3, 9, 1, 8], dtype=np.float32), *texts)).core
    assert refreshed is not None
    assert refreshed.tolist() == [False, True, False, True]
    assert policy.give_up(0, refreshed, 1).tolist() == [True, True, False, True]


def test_a_quarter_at_a_time_until_the_core_is_left() -> None:
    desk = Desk(200)
    sequence = desk.admit(_request(Avl(100, 80, 20), Formats("exact", "exact", "int4"), 2, 50, 2, 4))
    assert sequence is not None
    assert [desk.notch() for _ in range(5)] == [Action.EVICT] * 4 + [Action.HOLD]
    assert [rows.counts()["secondary"] for rows in _cache(sequence).rows] == [0] * LAYERS
    assert [rows.counts()["core"] for rows in _cache(sequence).rows] == [10] * LAYERS
    assert sequence.pressure.rows_evicted == LAYERS * 30


@given(text=st.sampled_from(NAMES), core=st.sampled_from(NAMES), secondary=st.sampled_from(NAMES), one=st.booleans())
def test_formats_only_ever_get_smaller(text: str, core: str, secondary: str, one: bool) -> None:
    formats, seen = Formats(text, core, secondary), 0
    while (smaller := smaller_formats(formats, one, SHAPE)) is not None:
        assert smaller.text == text
        assert one or smaller.core == core
        assert not one or SIZE[smaller.core] == SIZE[formats.core] + 1
        assert one or SIZE[smaller.secondary] == SIZE[formats.secondary] + 1
        formats, seen = smaller, seen + 1
    assert seen <= 2


def test_low_rank_and_odd_rows_have_no_smaller_format() -> None:
    assert smaller_formats(Formats("exact", "lowrank:4", "lowrank:4"), True, SHAPE) is None
    assert smaller_formats(Formats(), True, KvShape(1, 2, 15, 4)) is None
    narrow = KvShape(1, 1, 8, 2)  # an int8 record is as long as the row
    assert smaller_formats(Formats(), True, narrow) in (None, Formats("exact", "int4", "int4"))


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=LAYERS, max_size=LAYERS),
    format_=st.sampled_from(NAMES),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_crowded_rows_need_the_fewest_pages(
    counts: list[tuple[int, int]], format_: str, share: float, seed: int
) -> None:
    pool, random = RowPool(60, SHAPE), np.random.default_rng(seed)
    rows = SequenceRows(pool, LAYERS, 60, Formats(format_, format_, format_))
    for layer, (text, images) in enumerate(counts):
        core = np.zeros(images, dtype=np.bool_)
        rows.fill(layer, np.arange(text, dtype=np.int32), 100 + np.arange(images, dtype=np.int32), core, 0)
    for layer, (text, images) in enumerate(counts):
        rows.keep_text(layer, random.random(text) < share)
        rows.keep_image(layer, random.random(images) < share)
    before, after = pool.crowd(rows.lease, format_)
    assert not set(before.tolist()) & set(after.tolist())
    count = sum(len(each.text_ids) + len(each.image_ids) for each in rows)
    assert rows.lease.held == -(-count // pool.packing(format_).rows)


def test_pages_are_given_back_once_and_only_free_ones() -> None:
    pool = RowPool(10, SHAPE)
    lease = pool.lease(6)
    first, second = pool.allocate(3 * PAGE_ROWS, lease), pool.allocate(2 * PAGE_ROWS, lease)
    assert pool.take_worn().tolist() == []
    pool.release(first, lease)
    assert pool.take_worn().tolist() == [0, 1, 2]
    assert pool.take_worn().tolist() == []
    pool.release(pool.allocate(1, lease), lease)
    pool.release(second, lease)
    assert pool.take_worn().tolist() == [0, 3, 4]


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


def test_memory_that_is_no_whole_page_is_not_given_back() -> None:
    block = np.ones(100, dtype=np.uint8)
    begin = block.ctypes.data
    assert advise_free(begin, begin + 100) == 0
    assert bool((block == 1).all())


_RESIDENT = """
import sys
import numpy as np, torch
from avl_edge import allocator
from avl_edge.config import KvShape
from avl_edge.pool import RowPool, RowStore

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
back = store.give_back(pool.take_worn()) // 2**20
print(full - before, full - resident(), back, float(store.keys[:len(ids) // 4].mean()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_process_becomes_smaller_by_what_it_gives_back() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", _RESIDENT], cwd=root, check=True, capture_output=True, timeout=120)
    grown, given, said, kept = map(float, done.stdout.split())
    assert grown == pytest.approx(128, abs=8)
    assert given == pytest.approx(96, abs=8)
    assert said == pytest.approx(given, abs=8)
    assert kept == 1


def test_what_cannot_be_moved_is_not_touched() -> None:
    """Rows in another device's memory: only admission stops."""
    desk = Desk(100)
    sequence = desk.admit(_request(Full(), Formats(), 2, 40, 2, 4))
    assert sequence is not None
    relief = Relief(desk.monitor, desk.pool, None, desk.scheduler)  # type: ignore[arg-type]
    desk.monitor.short = True
    relief.check(_fail)
    assert desk.scheduler.is_held
    assert (sequence.pressure.demotions, sequence.pressure.rows_evicted) == (0, 0)


def _raises(*_: Any) -> None:
    raise MemoryError("not even for that")


def test_an_error_in_the_middle_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(400)
    both = [desk.admit(_request(Full(), Formats(), 2, 40, 2, 4)) for _ in range(2)]
    broken: list[Running] = []

    def drop(sequence: Running, _: BaseException) -> None:
        broken.append(sequence)
        desk.scheduler.drop((sequence,))

    desk.monitor.short = True
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "write_records", _raises)
        desk.relief.check(drop)
    assert broken == both
    desk.pool.check_integrity([])
    assert desk.admit(_request(Full(), Formats(), 2, 40, 2, 4)) is not None
