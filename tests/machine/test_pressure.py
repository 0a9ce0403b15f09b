"""When memory is short and what is decided then, from recorded trees and made-up moments."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import BadInput
from avl_edge.machine.pressure import (
    Action,
    Limits,
    Monitor,
    Pressure,
    State,
    after,
    decide,
    is_plentiful,
    is_short,
    read,
)
from tests.equipment.machines import GB, TREES, write

LIMITS = Limits(2 * GB)


def test_a_recorded_orin_is_read() -> None:
    assert read(TREES / "agx-orin-64-jp62") == Pressure(49968128 * 1024, 0.0, 125440)


def test_a_control_group_leaves_less_than_the_machine_has() -> None:
    limit = int((TREES / "container-limit/sys/fs/cgroup/memory.max").read_text())
    available = read(TREES / "container-limit").available_bytes
    assert available is not None
    assert available < limit


def test_without_the_kernels_files_there_is_no_pressure(tmp_path: Path) -> None:
    assert read(tmp_path) == Pressure()
    monitor = Monitor(LIMITS, tmp_path)
    assert [monitor.poll(lambda: (True, True)) for _ in range(3)] == [Action.FREE] * 3
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("\x00 rubbish")
    assert monitor.poll(lambda: (True, True)) is Action.FREE


@pytest.mark.parametrize("reserve", [-1, 1.5, "2GB", True, None])
def test_a_reserve_is_a_number_of_bytes(reserve: object) -> None:
    with pytest.raises(BadInput, match="reserve_bytes must be"):
        Limits(reserve)  # type: ignore[arg-type]


def test_a_reserve_of_more_than_there_is_is_refused(tmp_path: Path) -> None:
    """It would let requests wait for ever."""
    write(tmp_path, 6 * GB)
    with pytest.raises(BadInput, match=r"9\.0 GB cannot be kept: there are 8\.2 GB"):
        Monitor(Limits(9 * GB), tmp_path)


@pytest.mark.parametrize(
    ("can_demote", "can_evict", "action"),
    [
        (True, True, Action.DEMOTE),
        (True, False, Action.DEMOTE),
        (False, True, Action.EVICT),
        (False, False, Action.HOLD),
    ],
)
def test_formats_first_then_rows_then_requests(can_demote: bool, can_evict: bool, action: Action) -> None:
    state = State(LIMITS, can_demote=can_demote, can_evict=can_evict)
    assert decide(state, Pressure(GB)) is action
    assert decide(state, Pressure(5 * GB, 40.0, 1)) is action
    assert decide(state, Pressure(5 * GB)) is Action.FREE


def test_an_average_counts_only_while_somebody_still_waits() -> None:
    """It falls over many seconds: an escalation for each of its echoes would take all that there is."""
    state = State(LIMITS, can_demote=True)
    first = Pressure(5 * GB, 40.0, 1000)
    assert decide(state, first) is Action.DEMOTE
    state = after(state, first, Action.DEMOTE)
    assert decide(state, first) is Action.STAY
    assert decide(state, Pressure(5 * GB, 30.0, 1001)) is Action.DEMOTE
    assert decide(state, Pressure(5 * GB, 5.0, 1001)) is Action.FREE


_pressures = st.builds(
    Pressure,
    st.none() | st.integers(0, 10 * GB),
    st.none() | st.floats(0, 100),
    st.none() | st.integers(0, 10**9),
)


@given(
    moments=st.lists(st.tuples(_pressures, st.booleans(), st.booleans()), max_size=20), reserve=st.integers(0, 9 * GB)
)
def test_plenty_never_acts_and_shortage_always_does(moments: list[tuple[Pressure, bool, bool]], reserve: int) -> None:
    limits = Limits(reserve)
    state = State(limits)
    for pressure, can_demote, can_evict in moments:
        state = State(limits, state.short, state.stalled_us, can_demote, can_evict)
        action = decide(state, pressure)
        short, plentiful = is_short(state, pressure), is_plentiful(limits, pressure)
        assert not (short and plentiful)
        assert (action in (Action.DEMOTE, Action.EVICT, Action.HOLD)) == short
        assert not plentiful or action is Action.FREE
        assert action is not Action.STAY or state.short
        assert not can_demote or action is not Action.EVICT
        assert not (can_demote or can_evict) or action is not Action.HOLD
        state = after(state, pressure, action)
        assert state.short == (action is not Action.FREE)


@given(available=st.integers(0, 10 * GB), more=st.integers(0, 10 * GB), short=st.booleans())
def test_more_free_memory_never_takes_more(available: int, more: int, short: bool) -> None:
    order = [Action.FREE, Action.STAY, Action.DEMOTE]
    state = State(LIMITS, short, can_demote=True)
    actions = [decide(state, Pressure(each)) for each in (available, available + more)]
    assert order.index(actions[1]) <= order.index(actions[0])


def test_the_monitor_looks_now_and_then_with_hysteresis(tmp_path: Path) -> None:
    write(tmp_path, 3 * GB)
    now = 0.0
    monitor = Monitor(LIMITS, tmp_path, every_ms=100, clock=lambda: now)
    seen = []
    for available in (3 * GB, GB, 2 * GB + 10**6, 3 * GB, 2 * GB + 10**6):
        write(tmp_path, available)
        assert monitor.is_due
        seen.append(monitor.poll(lambda: (False, False)))
        assert not monitor.is_due
        now += 0.05
        assert not monitor.is_due
        now += 0.06
    assert seen == [Action.FREE, Action.HOLD, Action.STAY, Action.FREE, Action.FREE]
    assert monitor.describe() == "2.0 GB available, 2.0 GB reserved for others"
    write(tmp_path, GB, 14.0, 5)
    monitor.poll(lambda: (False, False))
    assert monitor.describe() == "1000.0 MB available, 2.0 GB reserved for others, others wait 14 % of the time"


def test_a_machine_that_goes_away_ends_the_pressure(tmp_path: Path) -> None:
    """A file that can no longer be read says nothing, and nothing is done for it."""
    write(tmp_path, GB)
    monitor = Monitor(LIMITS, tmp_path)
    assert monitor.poll(lambda: (False, False)) is Action.HOLD
    shutil.rmtree(tmp_path / "proc")
    assert monitor.poll(lambda: (False, False)) is Action.FREE
