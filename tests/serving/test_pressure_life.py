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
from avl_edge.serving.scheduler import Running
from tests.equipment.pressure_desk import SHAPE, Desk, cache_of, fail, request_for
from tests.equipment.random_methods import LAYERS, NAMES, choices

STARTS = ("exact", *NAMES)  # exact rows have the longest way down


class PressureLife(RuleBasedStateMachine):
    """Admissions, steps, escalations, recoveries and ends over one small pool. Every row reads as it must, always."""

    @initialize(pages=st.integers(6, 60))
    def open(self, pages: int) -> None:
        self.desk = Desk(pages)

    @rule(
        choice=choices(STARTS),
        prefix=st.integers(0, 6),
        images=st.integers(0, 60),
        text=st.integers(1, 8),
        steps=st.integers(0, 12),
    )
    def admit(self, choice: tuple[Method, Formats], prefix: int, images: int, text: int, steps: int) -> None:
        request = request_for(*choice, prefix, images, text, steps)
        room = request.plan.pages <= self.desk.pool.pages_unreserved and not self.desk.scheduler.is_held
        assert (self.desk.admit(request) is not None) == room

    @precondition(lambda self: any(self.desk.left.values()))
    @rule(choice=st.integers(0, 10**6))
    def step(self, choice: int) -> None:
        ready = [each for each, left in self.desk.left.items() if left]
        self.desk.step(ready[choice % len(ready)])

    @rule()
    def memory_is_short(self) -> None:
        action = self.desk.escalate()
        assert action is not Action.HOLD or self.desk.scheduler.is_held

    @rule()
    def there_is_memory_again(self) -> None:
        self.desk.escalate(short=False)
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
    desk = Desk(request.plan.pages)
    sequence = desk.admit(request)
    assert sequence is not None
    for _ in range(min(at, steps)):
        desk.step(sequence)
    actions = []
    while not actions or actions[-1] is not Action.HOLD:
        smaller = desk.handler.smaller(sequence)
        actions.append(desk.escalate())
        assert (actions[-1] is Action.DEMOTE) == (smaller is not None)
        desk.check()
    assert desk.escalate() is Action.HOLD
    assert not cache_of(sequence).can_evict
    assert sequence.pressure.demotions == actions.count(Action.DEMOTE) <= 2
    assert (sequence.pressure.rows_evicted > 0) == (Action.EVICT in actions)
    while desk.left[sequence]:
        desk.step(sequence)
    desk.check()


def test_a_lease_shrinks_to_what_may_still_come_and_others_get_the_rest() -> None:
    """Full attention over 60 image tokens: the plan of a second one that did not fit beside it does now."""
    request = request_for(Full(), Formats(), 4, 60, 4, 8)
    desk = Desk(request.plan.pages + request.plan.pages // 2)
    first = desk.admit(request)
    assert first is not None
    assert desk.admit(request) is None
    assert [desk.escalate(), desk.escalate(), desk.escalate()] == [Action.DEMOTE, Action.DEMOTE, Action.HOLD]
    assert cache_of(first).formats == Formats("exact", "int4", "int4")
    packed = kv_plan(Full(), Formats("exact", "int4", "int4"), SHAPE, PromptShape(4, 60, 4), 8)
    assert cache_of(first).rows.lease.limit == packed.pages < request.plan.pages / 2
    desk.escalate(short=False)
    second = desk.admit(request)
    assert second is not None
    assert second.pressure.demotions == 0
    assert cache_of(second).formats == Formats()
    desk.check()


def test_a_full_lease_has_room_for_the_change() -> None:
    """Every row of its three pages is held: the first layer's rows alone would leave no page before they need one."""
    request = request_for(Full(), Formats(), 0, 12, 4, 0)
    desk = Desk(request.plan.pages)
    sequence = desk.admit(request)
    assert sequence is not None
    lease = cache_of(sequence).rows.lease
    assert (lease.held, lease.limit) == (3, 3)
    change = Demotion(cache_of(sequence).rows, Formats("exact", "int8", "int8"))
    assert change.batches() == [[0, 1], [2]]
    assert desk.escalate() is Action.DEMOTE
    desk.check()
    assert (lease.held, lease.limit) == (2, 2)


def test_a_quarter_at_a_time_until_the_core_is_left() -> None:
    desk = Desk(200)
    sequence = desk.admit(request_for(Avl(100, 80, 20), Formats("exact", "exact", "int4"), 2, 50, 2, 4))
    assert sequence is not None
    assert [desk.escalate() for _ in range(5)] == [Action.EVICT] * 4 + [Action.HOLD]
    assert [rows.counts()["secondary"] for rows in cache_of(sequence).rows] == [0] * LAYERS
    assert [rows.counts()["core"] for rows in cache_of(sequence).rows] == [10] * LAYERS
    assert sequence.pressure.rows_evicted == LAYERS * 30


def test_what_cannot_be_moved_is_not_touched() -> None:
    """Rows in another device's memory: only admission stops."""
    desk = Desk(100)
    sequence = desk.admit(request_for(Full(), Formats(), 2, 40, 2, 4))
    assert sequence is not None
    handler = MemoryPressureHandler(desk.monitor, desk.pool, None, desk.scheduler)  # type: ignore[arg-type]
    desk.monitor.short = True
    handler.check(fail)
    assert desk.scheduler.is_held
    assert (sequence.pressure.demotions, sequence.pressure.rows_evicted) == (0, 0)


def _raises(*_: Any) -> None:
    raise MemoryError("not even for that")


def test_an_error_in_the_middle_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(400)
    both = [desk.admit(request_for(Full(), Formats(), 2, 40, 2, 4)) for _ in range(2)]
    broken: list[Running] = []

    def drop(sequence: Running, _: BaseException) -> None:
        broken.append(sequence)
        desk.scheduler.drop((sequence,))

    desk.monitor.short = True
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "write_records", _raises)
        desk.handler.check(drop)
    assert broken == both
    desk.pool.check_integrity([])
    assert desk.admit(request_for(Full(), Formats(), 2, 40, 2, 4)) is not None
