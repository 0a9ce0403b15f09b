"""One answer on its way, for one taker in a coroutine."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field

from ..errors import DeadlineExceeded
from ..request import Result, TokenEvent
from ..serving.handle import Handle
from .asking import Urgency
from .held_pictures import Prepared
from .wire import ChatRequest


@dataclass(eq=False)
class Answer:
    """``number`` is its id on the wire; it was ``created`` so many seconds after 1970, and its request ``came`` at so
    many of perf_counter. ``cached_tokens`` of its prompt were there already. ``is_late``: its deadline has cut it.
    ``begun`` and ``token_times``: when it was submitted, and its tokens were seen, of perf_counter."""

    asked: ChatRequest
    prepared: Prepared
    handle: Handle
    urgency: Urgency
    came: float
    cached_tokens: int
    number: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    is_late: bool = False
    begun: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)
    _next: asyncio.Task[TokenEvent | None] | None = None

    @property
    def result(self) -> Result | None:
        """Once it has ended, also before its time."""
        return self.handle.outcome

    @property
    def prompt_ms(self) -> float:
        """How long its pictures and its prompt were run, and the rows that others may use from now on."""
        if self.result is None:
            return 0.0
        times, session = self.result.timings, self.prepared.session
        own = times.encode_ms + times.prefill_ms
        if session is None or self.cached_tokens:
            return own
        return own + session.stats.encode_ms + session.stats.prefill_ms

    @property
    def finish_reason(self) -> str:
        """As clients are told; ``abort`` and ``error`` are never seen by one."""
        if self.is_late:
            return "length"
        reason = self.result.finish_reason if self.result else "cancelled"
        return "abort" if reason == "cancelled" else reason

    async def wait(self, seconds: float) -> bool:
        """Wait for the next event, at most so long; whether :meth:`next_event` would return at once. Raises what ended
        the request before its time."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._take())
        done, _ = await asyncio.wait((self._next,), timeout=seconds)
        if done:
            self._next.result()
        return bool(done)

    async def next_event(self) -> TokenEvent | None:
        """The next event; None after the last one, and where the deadline has cut it."""
        if self._next is None:
            return await self._take()
        task, self._next = self._next, None
        return await task

    async def _take(self) -> TokenEvent | None:
        try:
            event = await anext(self.handle, None)
        except DeadlineExceeded:
            if self.urgency.late != "cut" or self.result is None or not self.result.token_ids:
                raise
            self.is_late = True
            return None
        if event is not None:
            self.token_times.append(time.perf_counter())
        return event

    def close(self) -> None:
        """Nobody waits for it any more: what it holds is freed at once. Twice is safe."""
        self.handle.cancel()
        task, self._next = self._next, None  # whose error would keep this answer, and its pixels, in a circle
        if task is not None:
            task.cancel()
