"""One request as a synchronous caller sees it: events to iterate, a result, an end."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from ..kv.cache import SequenceCache
from ..request import Prompt, Result, TokenEvent
from .handle import Handle
from .requests import Request


class Generation(Iterator[TokenEvent]):
    """One request's events, in order. Closing, or dropping it, frees its rows.

    ``handle`` is the same request for threads that must not wait, and for coroutines.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __next__(self) -> TokenEvent:
        event = self.handle.next_event()
        if event is None:
            raise StopIteration
        return event

    @property
    def request(self) -> Request:
        """What was submitted: its ``plan`` is the most that it may hold."""
        return self.handle.request

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended, as its :meth:`result` says; ``error`` where that raises. None while it is on its way."""
        return self.handle.finish_reason

    @property
    def cache(self) -> SequenceCache | None:
        """The rows that this request holds, for traces and tests; None until it is admitted."""
        return self.handle.cache

    @property
    def prompt(self) -> Prompt:
        """What the model was given: token ids, image spans and pixels."""
        return self.request.prompt

    def result(self, timeout: float | None = None) -> Result:
        """Run to the end, leaving the events that were not taken, and give the whole answer; as
        :meth:`~avl_edge.serving.handle.Handle.result`."""
        return self.handle.result(timeout)

    def close(self) -> None:
        """Stop here. Rows are free on return; the result says ``cancelled``. Closing twice is safe."""
        self.handle.cancel()
        self.handle.wait()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
