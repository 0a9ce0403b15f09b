"""Is memory short, and what follows: other processes come and go, and what they need was promised to them too.

:func:`read` reads, :func:`decide` says what to do about it, :class:`Monitor` asks both now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ..config import format_size, require
from .device import read_shortage

_MARGIN, _MOST_MARGIN = 0.25, 512 * 2**20
"""Memory is plentiful again a quarter above the reserve, or so many bytes: hysteresis against switching back and
forth."""

POLL_MS = 250.0
"""How often a machine's files are read at most, where nobody says otherwise."""


@dataclass(frozen=True)
class Pressure:
    """What the kernel tells at one moment; None for what it does not.

    ``available_bytes``: the lesser of MemAvailable and the control group's room. ``stall_percent``: of the last ten
    seconds, the share in which some process waited for memory; ``stalled_us``: all such time since the machine started.
    """

    available_bytes: int | None = None
    stall_percent: float | None = None
    stalled_us: int | None = None


def read(root: str | Path = "/") -> Pressure:
    """The pressure on this machine, or in a recorded file tree. What is not there, or not understood, is None.

    Raises :class:`~avl_edge.errors.BadInput` only if ``root`` is not a folder.
    """
    memory = read_shortage(root)
    stall = memory.pressure
    if stall is None:
        return Pressure(memory.usable_bytes)
    return Pressure(memory.usable_bytes, stall.some_avg10_percent, stall.some_total_us)


@dataclass(frozen=True)
class Limits:
    """``reserve_bytes`` stay available to other processes; ``stall_percent``: more waiting than that is pressure;
    ``most_wait_s``: so many seconds a request waits for memory, and no longer."""

    reserve_bytes: int
    stall_percent: float = 10.0
    most_wait_s: float = 60.0

    def __post_init__(self) -> None:
        whole = isinstance(self.reserve_bytes, int) and not isinstance(self.reserve_bytes, bool)
        require(whole and self.reserve_bytes >= 0, f"reserve_bytes must be 0 or more bytes, not {self.reserve_bytes!r}")
        require(
            0 < self.stall_percent <= 100, f"stall_percent must be above 0 and at most 100, not {self.stall_percent}"
        )
        require(self.most_wait_s > 0, f"most_wait_s must be a number of seconds above 0, not {self.most_wait_s}")


class Action(Enum):
    """What to do until the next poll. All but ``FREE`` leave admission as it is, or stop it (``HOLD``)."""

    FREE = "free"
    STAY = "stay"
    DEMOTE = "demote"
    EVICT = "evict"
    HOLD = "hold"


@dataclass(frozen=True)
class State:
    """What a decision depends on beside the pressure.

    ``short``: memory was short when it was last polled, and has not been plentiful since; ``stalled_us`` as it was
    then (None: never polled). ``can_demote``, ``can_evict``: whether running requests still have rows to give.
    """

    limits: Limits
    short: bool = False
    stalled_us: int | None = None
    can_demote: bool = False
    can_evict: bool = False


def is_short(state: State, pressure: Pressure) -> bool:
    """Whether memory is short now.

    The average over ten seconds goes on telling of a pressure that is over: it counts only while somebody still waits.
    """
    available, stall = pressure.available_bytes, pressure.stall_percent
    if available is not None and available < state.limits.reserve_bytes:
        return True
    waits = state.stalled_us is None or (pressure.stalled_us or 0) > state.stalled_us
    return stall is not None and stall > state.limits.stall_percent and waits


def is_plentiful(limits: Limits, pressure: Pressure) -> bool:
    """Whether there is clearly enough: more than the reserve by a margin, and half of the waiting that is pressure."""
    available, stall = pressure.available_bytes, pressure.stall_percent
    margin = min(_MARGIN * limits.reserve_bytes, _MOST_MARGIN)
    enough = available is None or available >= limits.reserve_bytes + margin
    return enough and (stall is None or stall <= limits.stall_percent / 2)


def decide(state: State, pressure: Pressure) -> Action:
    """One escalation level at a time, in order: smaller formats, fewer rows, no new requests. Between short and
    plentiful all stays."""
    if is_short(state, pressure):
        return Action.DEMOTE if state.can_demote else Action.EVICT if state.can_evict else Action.HOLD
    if state.short and not is_plentiful(state.limits, pressure):
        return Action.STAY
    return Action.FREE


def after(state: State, pressure: Pressure, action: Action) -> State:
    """The state for the next poll."""
    return replace(state, short=action is not Action.FREE, stalled_us=pressure.stalled_us)


class Monitor:
    """Polls at most every ``every_ms``; ``clock`` gives seconds. ``own_bytes``: what this process takes at least.

    Raises :class:`~avl_edge.errors.BadInput` for a reserve that this machine cannot keep.
    """

    def __init__(
        self,
        limits: Limits,
        root: str | Path = "/",
        every_ms: float = POLL_MS,
        clock: Callable[[], float] = time.monotonic,
        own_bytes: int = 0,
    ) -> None:
        self._state = State(limits)
        self._root, self._every, self._clock = root, every_ms / 1000, clock
        self._polled: float | None = None
        self.pressure = read(root)
        memory = read_shortage(root)
        sizes = [memory.total_bytes, memory.cgroup.limit_bytes if memory.cgroup else None]
        size = min((each for each in sizes if each is not None), default=None)
        beside = f", of which this process takes {format_size(own_bytes)}" if own_bytes else ""
        require(
            size is None or limits.reserve_bytes + own_bytes < size,
            f"a reserve of {format_size(limits.reserve_bytes)} cannot be kept: there are {format_size(size or 0)}"
            f"{beside}",
        )

    @property
    def most_wait_s(self) -> float:
        """How long a request waits for memory at most, in seconds."""
        return self._state.limits.most_wait_s

    @property
    def is_due(self) -> bool:
        """Whether :meth:`poll` would read the machine."""
        return self._polled is None or self._clock() - self._polled >= self._every

    def poll(self, gives: Callable[[], tuple[bool, bool]]) -> Action:
        """Read and decide. ``gives`` is asked when memory is short: can running requests demote rows, evict rows?"""
        self._polled = self._clock()
        self.pressure = read(self._root)
        state = self._state
        if is_short(state, self.pressure):
            can_demote, can_evict = gives()
            state = replace(state, can_demote=can_demote, can_evict=can_evict)
        action = decide(state, self.pressure)
        self._state = after(state, self.pressure, action)
        return action

    def describe(self) -> str:
        """The last reading in words, like ``1.2 GB available, 2.0 GB reserved for others, others wait 3 %``."""
        available, stall = self.pressure.available_bytes, self.pressure.stall_percent
        parts = [] if available is None else [f"{format_size(available)} available"]
        parts.append(f"{format_size(self._state.limits.reserve_bytes)} reserved for others")
        parts += [] if not stall else [f"others wait {stall:g} % of the time"]
        return ", ".join(parts)
