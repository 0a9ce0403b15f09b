"""What is around every request: an id, who asks, one line in the log, and an error where something raised one."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from .access import OPEN_PATHS, ClientGone, Keys, Receive, check_host, document
from .metrics import Metrics
from .refusals import Refusal, refusal_of
from .settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("avl_edge.server")
_SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
CLIENT_GONE = 499
"""What the log says where nobody was there to answer; nginx's number."""


class JsonLines(logging.Formatter):
    """Each record as one line of JSON; ``extra={"fields": {...}}`` of a record stands beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


class Frame:
    """The application ``inside``, for those who have one of ``keys`` and ask for one of this service's hosts."""

    def __init__(self, inside: Application, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self._inside, self._settings, self._keys, self._metrics = inside, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inside(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        own = headers.get("x-request-id", "")
        number = own if _SOUND_ID.fullmatch(own) else f"req-{uuid.uuid4().hex}"
        reply = _Reply(send, number)
        scope["state"] = {"came": time.perf_counter(), "headers": headers, "log": reply.fields, "client": ""}
        try:
            check_host(headers, self._settings.hosts)
            if scope["path"] not in OPEN_PATHS:
                scope["state"]["client"] = self._keys.client(headers)
            await self._inside(scope, receive, reply.send)
        except ClientGone:
            reply.status = CLIENT_GONE
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.http_status == 500:
                _log.error("a request failed", exc_info=error, extra={"fields": {"request_id": number}})
            self._metrics.refused(refusal)
            reply.fields["error_code"] = refusal.code
            if not reply.has_begun:
                await reply.refuse(refusal)
        finally:
            self._say(scope, number, reply)

    def _say(self, scope: Scope, number: str, reply: _Reply) -> None:
        took = 1000 * (time.perf_counter() - scope["state"]["came"])
        fields = {
            "request_id": number,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": reply.status,
            "ms": round(took, 1),
            **reply.fields,
        }
        quiet = scope["method"] == "GET" and reply.status == 200
        _log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


class _Reply:
    """What is sent, with the headers that every answer has; ``fields`` are for the log."""

    def __init__(self, send: Send, number: str) -> None:
        self._send, self._number = send, number
        self.has_begun = False
        self.status = CLIENT_GONE
        self.fields: dict[str, Any] = {}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.has_begun, self.status = True, message["status"]
            own = [(b"x-request-id", self._number.encode()), *_HEADERS]
            given = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(each for each in own if each[0] not in given)]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        content = document(refusal.body)
        headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.http_status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content})
