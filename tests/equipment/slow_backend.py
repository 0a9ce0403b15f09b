"""A backend that stops where a test wants it to, so that there is a moment in which the engine is busy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from avl_edge import Runtime

LIMIT = 60.0
"""Seconds after which a wait counts as a hang."""


class Stop:
    """``reached`` when the backend has come there; it goes on with ``go``."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def here(self) -> None:
        self.reached.set()
        assert self.go.wait(LIMIT), "nobody let the backend go on"


@contextmanager
def stopped(runtime: Runtime, stage: str = "decode") -> Iterator[Stop]:
    """The engine stands in the next ``stage`` (begin_encode, begin_prefill, decode) until the end of the block."""
    backend: Any = runtime.debug.backend
    stop, function = Stop(), getattr(backend, stage)
    with pytest.MonkeyPatch.context() as patch:

        def stops(*arguments: Any, **named: Any) -> Any:
            stop.here()
            return function(*arguments, **named)

        patch.setattr(backend, stage, stops)
        try:
            yield stop
        finally:
            stop.go.set()
