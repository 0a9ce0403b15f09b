"""A request that was submitted, for whoever waits for its answer: a thread, or a coroutine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Protocol

from ..kv.cache import SequenceCache
from ..request import Result, TokenEvent
from .requests import Request, Running


class Home(Protocol):
    """The engine that a request was submitted to."""

    @property
    def threaded(self) -> bool: ...

    def cancel_sequence(self, sequence: Running) -> None: ...

    def drive(self) -> None: ...


class Handle(AsyncIterator[TokenEvent]):
    """One request of an engine. Events are there for one taker; every thread may ask for the :meth:`result`.

    Dropped, it cancels its request. An interrupt, or the cancellation of a coroutine, that comes while it waits cancels
    it too.
    """

    def __init__(self, engine: Home, sequence: Running) -> None:
        """:meth:`avl_edge.serving.engine.Engine.submit` makes it."""
        self._sequence = sequence
        self._engine = engine

    @property
    def request(self) -> Request:
        """What was submitted: its ``plan`` is the most that it may hold."""
        return self._sequence.request

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended, as its :meth:`result` says; ``error`` where that raises. None while it is on its way."""
        result = self._sequence.result
        return result.finish_reason if result else None

    @property
    def outcome(self) -> Result | None:
        """What there is of the answer once it has ended, also where :meth:`result` raises; None while it is on its
        way."""
        return self._sequence.result

    @property
    def cache(self) -> SequenceCache | None:
        """The rows that this request holds, for traces and tests between two steps; None until it is admitted."""
        return self._sequence.cache

    def next_event(self) -> TokenEvent | None:
        """The next event; None after the last one. Waits. Raises what ended the request before its time."""
        events = self._sequence.events
        if not self._engine.threaded:
            while not events.is_ready:
                self._wait(None)
        try:
            event = events.get()
        except BaseException:
            self.cancel()
            raise
        if event is None:
            self._raise_failure()
        return event

    def events(self) -> Iterator[TokenEvent]:
        """The events, each when it is there: for a thread."""
        while (event := self.next_event()) is not None:
            yield event

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end, leaving the events that were not taken, and give the whole answer.

        Raises what ended the request before its time, and :class:`TimeoutError` after ``timeout`` seconds, which leaves
        it on its way.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the answer was not complete after {timeout:g} s")
        self._raise_failure()
        result = self._sequence.result
        assert result is not None, "events end after the result is there"
        return result

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; whether it is there."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._sequence.events.has_ended:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._wait(left)
        return True

    def _wait(self, timeout: float | None) -> None:
        """Let some time pass."""
        try:
            if self._engine.threaded:
                self._sequence.events.wait(timeout)
            else:
                self._engine.drive()
        except BaseException:
            self.cancel()
            raise

    def _raise_failure(self) -> None:
        if self._sequence.failure:
            raise self._sequence.failure.exception()  # kept in no variable: its trace has this frame

    def cancel(self) -> None:
        """End it, from any thread or finalizer; returns at once. Its result then says ``cancelled``."""
        if not self._sequence.events.has_ended:
            self._engine.cancel_sequence(self._sequence)

    async def __anext__(self) -> TokenEvent:
        await self._until(lambda: self._sequence.events.is_ready)
        event = self.next_event()
        if event is None:
            raise StopAsyncIteration
        return event

    def __await__(self) -> Generator[object, None, Result]:
        """The :meth:`result`, in a coroutine."""
        yield from self._until(lambda: self._sequence.events.has_ended).__await__()
        return self.result()

    async def _until(self, is_there: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while not is_there():
            if not self._engine.threaded:
                self._wait(None)
                continue
            woken = loop.create_future()
            self._sequence.events.listen(partial(loop.call_soon_threadsafe, _wake, woken))
            if is_there():  # meanwhile, before anybody listened
                return
            try:
                await woken
            except asyncio.CancelledError:
                self.cancel()
                raise

    def __del__(self) -> None:
        self.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
