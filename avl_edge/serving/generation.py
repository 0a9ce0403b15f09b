"""One request as its caller sees it: events to iterate, a result, an end."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from ..kv.cache import SequenceCache
from ..request import Prompt, Result, TokenEvent
from .scheduler import Request, Running


class StepLoop(Protocol):
    """The loop that a generation drives."""

    def step(self) -> bool: ...

    def finish(self, sequence: Running, reason: str) -> None: ...


class Generation(Iterator[TokenEvent]):
    """One request's events, in order. Iterating drives the runtime; closing, or dropping it, frees its rows."""

    def __init__(self, runtime: StepLoop, sequence: Running) -> None:
        self._runtime = runtime
        self._sequence = sequence

    def __next__(self) -> TokenEvent:
        sequence = self._sequence
        while True:
            # The result is set after the last event, so it is looked at first: another thread may be stepping.
            finished = sequence.result is not None
            if sequence.events:
                return sequence.events.popleft()
            if finished:
                raise sequence.error or StopIteration
            self._step()

    def _step(self) -> None:
        if not self._runtime.step() and self._sequence.result is None:
            raise RuntimeError("this generation belongs to a runtime that no longer knows it")

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
    def cache(self) -> SequenceCache | None:
        """The rows that this request holds, for traces and tests; None until it is admitted."""
        return self._sequence.cache

    @property
    def prompt(self) -> Prompt:
        """What the model was given: token ids, image spans and pixels."""
        return self.request.prompt

    def result(self) -> Result:
        """Run to the end, leaving the events that were not taken, and give the whole answer."""
        while self._sequence.result is None:
            self._step()
        if self._sequence.error:
            raise self._sequence.error
        return self._sequence.result

    def close(self) -> None:
        """Stop here. Rows are free on return; the result says ``cancelled``. Closing twice is safe."""
        self._runtime.finish(self._sequence, "cancelled")

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
