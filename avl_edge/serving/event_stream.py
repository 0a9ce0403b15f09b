"""One request's events on their way from the engine's thread to whoever waits for them, in a thread or a coroutine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from ..request import TokenEvent


class EventStream:
    """:meth:`put` and :meth:`end` are the engine's, and never wait; everything else is the caller's."""

    def __init__(self) -> None:
        self._events: SimpleQueue[TokenEvent | None] = SimpleQueue()
        self._ended = threading.Event()
        self._listeners: deque[Callable[[], object]] = deque()

    def put(self, event: TokenEvent) -> None:
        """One more event."""
        self._events.put(event)
        self._tell()

    def end(self) -> None:
        """Nothing follows. Ending twice is safe."""
        self._events.put(None)
        self._ended.set()
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
        return self._ended.is_set()

    def get(self) -> TokenEvent | None:
        """The next event; None, again and again, after the last one. Waits."""
        event = self._events.get()
        if event is None:
            self._events.put(None)
        return event

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; whether it is there."""
        return self._ended.wait(timeout)

    def listen(self, callback: Callable[[], object]) -> None:
        """Call back once, from the engine's thread, when there is something new; look again after this."""
        self._listeners.append(callback)
