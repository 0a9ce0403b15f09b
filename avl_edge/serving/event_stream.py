"""One request's events on their way from the engine's thread to whoever waits for them, in a thread or a coroutine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from ..request import TokenEvent

LOOK_AGAIN = 1.0
"""Seconds after which who waits for the end looks again by himself: another's interrupt may have kept it from him."""


class EventStream:
    """:meth:`put` and :meth:`end` are the engine's, and never wait; everything else is the caller's.

    Queues of C alone, and no lock of :mod:`threading`: an interrupt may fall between any two lines, and would leave
    such a lock taken.
    """

    def __init__(self) -> None:
        self._events: SimpleQueue[TokenEvent | None] = SimpleQueue()
        self._latch: SimpleQueue[None] = SimpleQueue()
        self._has_ended = False
        self._listeners: deque[Callable[[], object]] = deque()

    def put(self, event: TokenEvent) -> None:
        """One more event."""
        self._events.put(event)
        self._tell()

    def end(self) -> None:
        """Nothing follows. Ending twice is safe."""
        self._events.put(None)
        self._has_ended = True
        self._latch.put(None)
        self._tell()

    def _tell(self) -> None:
        while self._listeners:
            with suppress(IndexError, RuntimeError):  # the last one was taken meanwhile; its event loop was closed
                self._listeners.popleft()()

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`get` returns at once."""
        return not self._events.empty()

    @property
    def has_ended(self) -> bool:
        """Whether the engine has ended it; events may be left."""
        return self._has_ended

    def get(self) -> TokenEvent | None:
        """The next event; None, again and again, after the last one. Waits."""
        event = self._events.get()
        if event is None:
            self._events.put(None)
        return event

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; whether it is there."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._has_ended:
            left = LOOK_AGAIN if end is None else min(end - time.monotonic(), LOOK_AGAIN)
            if left <= 0:
                return False
            with suppress(Empty):
                self._latch.get(timeout=left)
                self._latch.put(None)  # for the next who waits
        return True

    def listen(self, callback: Callable[[], object]) -> None:
        """Call back once, from the engine's thread, when there is something new; look again after this."""
        self._listeners.append(callback)
