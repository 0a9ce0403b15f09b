"""Requests that give rows up while they run: their promises shrink, and every row reads as it must, always."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avl_edge.config import Formats, PromptShape
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.methods import Avl, Full, Method
from avl_edge.kv.pool.compaction import Demotion
from avl_edge.machine.pressure import Action
from avl_edge.serving.memory_pressure import MemoryPressureHandler
from avl_edge.serving.requests import Running
from tests.equipment.pressure_harness import SHAPE, Harness, cache_of, fail, request_for
from tests.equipment.random_methods import LAYERS, NAMES, choices

STARTS = ("exact", *NAMES)  # exact rows have the longest way down


class PressureLife(RuleBasedStateMachine):
    """Admissions, steps, escalations, recoveries and ends over one small pool. Every row reads as it must, always."""

    @initialize(pages=st.integers(6, 60))
    def open(self, pages: int) -> None:
        self.harness = Harness(pages)

    @rule(
        choice=choices(STARTS),
        prefix=st.integers(0, 6),
        images=st.integers(0, 60),
        text=st.integers(1, 8),
        steps=st.integers(0, 12),
    )
    def admit(self, choice: tuple[Method, Formats], prefix: int, images: int, text: int, steps: int) -> None:
        request = request_for(*choice, prefix, images, text, steps)
        room = request.plan.pages <= self.harness.pool.pages_unreserved and not self.harness.scheduler.is_held
        assert (self.harness.admit(request) is not None) == room

    @precondition(lambda self: any(self.harness.left.values()))
    @rule(choice=st.integers(0, 10**6))
    def step(self, choice: int) -> None:
        ready = [each for each, left in self.harness.left.items() if left]
        self.harness.step(ready[choice % len(ready)])

    @rule()
    def memory_is_short(self) -> None:
        action = self.harness.escalate()
        assert action is not Action.HOLD or self.harness.scheduler.is_held

    @rule()
    def there_is_memory_again(self) -> None:
        self.harness.escalate(short=False)
        assert not self.harness.scheduler.is_held

    @precondition(lambda self: bool(self.harness.scheduler.running))
    @rule(choice=st.integers(0, 10**6))
    def end(self, choice: int) -> None:
        running = self.harness.scheduler.running
        self.harness.end(running[choice % len(running)])

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            for sequence in self.harness.scheduler.running:
                while self.harness.left[sequence]:
                    self.harness.step(sequence)  # nobody who was admitted ever finds the pool empty
                self.harness.check()
                self.harness.end(sequence)
            self.harness.pool.check_integrity([])
            assert self.harness.pool.pages_unreserved == self.harness.pool.pages


PressureLife.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPressureLife = PressureLife.TestCase


@settings(max_examples=80, deadline=None)
@given(
    choice=choices(STARTS),
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
    request = request_for(*choice, prefix, images, text, steps)
    harness = Harness(request.plan.pages)
    sequence = harness.admit(request)
    assert sequence is not None
    for _ in range(min(at, steps)):
        harness.step(sequence)
    actions = []
    while not actions or actions[-1] is not Action.HOLD:
        smaller = harness.handler.smaller(sequence)
        actions.append(harness.escalate())
        assert (actions[-1] is Action.DEMOTE) == (smaller is not None)
        harness.check()
    assert harness.escalate() is Action.HOLD
    assert not cache_of(sequence).can_evict
    assert sequence.pressure.demotions == actions.count(Action.DEMOTE) <= 3
    assert (sequence.pressure.rows_evicted > 0) == (Action.EVICT in actions)
    while harness.left[sequence]:
        harness.step(sequence)
    harness.check()


def test_a_lease_shrinks_to_what_may_still_come_and_others_get_the_rest() -> None:
    """Full attention over 60 image tokens: the plan of a second one that did not fit beside it does now."""
    request = request_for(Full(), Formats(), 4, 60, 4, 8)
    harness = Harness(request.plan.pages + request.plan.pages // 2)
    first = harness.admit(request)
    assert first is not None
    assert harness.admit(request) is None
    assert [harness.escalate() for _ in range(4)] == [*[Action.DEMOTE] * 3, Action.HOLD]
    assert cache_of(first).formats == Formats("exact", "int4", "int4")
    packed = kv_plan(Full(), Formats("exact", "int4", "int4"), SHAPE, PromptShape(4, 60, 4), 8)
    assert cache_of(first).rows.lease.limit == packed.pages < request.plan.pages / 2
    harness.escalate(short=False)
    second = harness.admit(request)
    assert second is not None
    assert second.pressure.demotions == 0
    assert cache_of(second).formats == Formats()
    harness.check()


def test_a_full_lease_has_room_for_the_change() -> None:
    """Every row of its three pages is held: the first layer's rows alone would leave no page before they need one."""
    request = request_for(Full(), Formats(), 0, 12, 4, 0)
    harness = Harness(request.plan.pages)
    sequence = harness.admit(request)
    assert sequence is not None
    lease = cache_of(sequence).rows.lease
    assert (lease.held, lease.limit) == (3, 3)
    change = Demotion(cache_of(sequence).rows, Formats("exact", "int8", "int8"))
    assert change.batches() == [[0, 1], [2]]
    assert harness.escalate() is Action.DEMOTE
    harness.check()
    assert (lease.held, lease.limit) == (2, 2)


def test_a_quarter_at_a_time_until_the_core_is_left() -> None:
    harness = Harness(200)
    sequence = harness.admit(request_for(Avl(100, 80, 20), Formats("exact", "exact", "int4"), 2, 50, 2, 4))
    assert sequence is not None
    assert [harness.escalate() for _ in range(5)] == [Action.EVICT] * 4 + [Action.HOLD]
    assert [rows.counts()["secondary"] for rows in cache_of(sequence).rows] == [0] * LAYERS
    assert [rows.counts()["core"] for rows in cache_of(sequence).rows] == [10] * LAYERS
    assert sequence.pressure.rows_evicted == LAYERS * 30


def test_what_cannot_be_moved_is_not_touched() -> None:
    """Rows in another device's memory: only admission stops."""
    harness = Harness(100)
    sequence = harness.admit(request_for(Full(), Formats(), 2, 40, 2, 4))
    assert sequence is not None
    handler = MemoryPressureHandler(harness.monitor, harness.pool, None, harness.scheduler)  # type: ignore[arg-type]
    harness.monitor.short = True
    handler.check(fail)
    assert harness.scheduler.is_held
    assert (sequence.pressure.demotions, sequence.pressure.rows_evicted) == (0, 0)


def _raises(*_: Any) -> None:
    raise MemoryError("not even for that")


def test_an_error_in_the_middle_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(400)
    both = [harness.admit(request_for(Full(), Formats(), 2, 40, 2, 4)) for _ in range(2)]
    broken: list[Running] = []

    def drop(sequence: Running, _: BaseException) -> None:
        broken.append(sequence)
        harness.scheduler.drop((sequence,))

    harness.monitor.short = True
    with monkeypatch.context() as patch:
        patch.setattr(harness.store, "write_records", _raises)
        harness.handler.check(drop)
    assert broken == both
    harness.pool.check_integrity([])
    assert harness.admit(request_for(Full(), Formats(), 2, 40, 2, 4)) is not None
