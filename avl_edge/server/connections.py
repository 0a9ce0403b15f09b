"""Connections of HTTP: how many there may be, and how long one may keep silent before it asks."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings


class Connections:
    """What the connections of one server share. ``protocol`` is what uvicorn makes one of each of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.silent: dict[Connection, None] = {}  # those that have asked nothing yet or any more, the oldest first
        self.open: set[Connection] = set()
        self.protocol = type("BoundConnection", (Connection,), {"shared": self})

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self.open)

    def drop(self, connection: Connection) -> None:
        """Close one, which counts no longer."""
        self.open.discard(connection)
        self.silent.pop(connection, None)
        connection.transport.abort()


class Connection(H11Protocol):
    """One connection. It is closed where the head of a request does not come in time and, the one that has been silent
    longest, where there are too many."""

    shared: ClassVar[Connections]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _asks(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared = self.shared
        shared.open.add(self)
        if shared.count > shared.settings.max_connections:
            shared.drop(next(iter(shared.silent), self))
        self._fall_silent()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asks:
            self._speak()
        elif self._timer is None:
            self._fall_silent()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._asks:
            self._fall_silent()

    def connection_lost(self, exc: Exception | None) -> None:
        self.shared.open.discard(self)
        self._speak()
        super().connection_lost(exc)

    def _fall_silent(self) -> None:
        self._speak()
        if not self.transport.is_closing():
            self.shared.silent[self] = None
            self._timer = self.loop.call_later(self.shared.settings.header_timeout, self._close)

    def _speak(self) -> None:
        self.shared.silent.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if not self._asks:
            self.shared.drop(self)
