"""In which order requests are served, and what comes next: a layer of somebody's prompt, or a token for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .requests import Running

PATIENCE = 10.0
"""Seconds: how much later than another a request of the next higher priority may come and still be served first."""


@dataclass(frozen=True)
class Advance:
    """Run so many ``layers`` of a request's pictures and prompt."""

    sequence: Running
    layers: int


@dataclass(frozen=True)
class Decode:
    """One more token for each of ``sequences``."""

    sequences: Sequence[Running]


class SchedulePolicy(Protocol):
    """Asked by the scheduler, which alone knows who may be admitted. It changes nothing that it is given."""

    def order(self, waiting: Sequence[Running], now: float) -> Sequence[Running]:
        """``waiting`` for their first token, the most urgent first. Who does not fit into the pool keeps those behind
        it waiting."""
        ...

    def choose(self, waiting: Sequence[Running], running: Sequence[Running], now: float) -> Advance | Decode | None:
        """The next thing to do, at ``now`` (seconds, on the clock of ``submitted`` and ``due``): ``waiting`` are those
        whose prompts may be run, in that order, ``running`` those who have tokens. None: nothing."""
        ...


class FirstComeFirstServed:
    """Prompts one after the other, in the order in which requests came; between two layers of a prompt everybody who
    runs gets a token.

    A higher priority counts as having come :data:`PATIENCE` seconds earlier for each level, so that a request of a
    lower one is overtaken by those who come soon after it, and by nobody in the end. A deadline nearer than that counts
    as the later arrival that it would be due for: of two the one that is due first is served first.
    """

    def __init__(self, steps: int = 1) -> None:
        """``steps`` that who runs gets between two advances: more than one where a prompt runs whole."""
        self._steps = steps
        self._left = 0

    def order(self, waiting: Sequence[Running], now: float) -> Sequence[Running]:  # noqa: ARG002
        return sorted(waiting, key=_rank)

    def choose(
        self,
        waiting: Sequence[Running],
        running: Sequence[Running],
        now: float,  # noqa: ARG002
    ) -> Advance | Decode | None:
        if running and self._left:
            self._left -= 1
            return Decode(running)
        if waiting:
            self._left = self._steps
            return Advance(waiting[0], 1)
        return Decode(running) if running else None


def _rank(sequence: Running) -> float:
    due = sequence.submitted + PATIENCE
    if sequence.due is not None:
        due = min(due, sequence.due)
    return due - PATIENCE * sequence.priority
