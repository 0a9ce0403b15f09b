"""``POST /v1/chat/completions``: an answer whole or as server-sent events, for as long as its client is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from . import replies
from .access import Bodies, ClientGone, Receive, document
from .answer import Answer
from .frame import Scope, Send
from .refusals import refusal_of
from .service import Service

T = TypeVar("T")
_log = logging.getLogger("avl_edge.server")
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


class ChatCompletions:
    """Answers of ``service``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service.settings)
        self._spell = lru_cache(maxsize=4096)(service.runtime.token_text)

    async def __call__(self, request: Request) -> Response:
        """Raises :class:`Refusal` and what else keeps an answer from beginning."""
        state = request.scope["state"]
        answer = await self._begun(request)
        state["log"].update(answer_id=answer.number, prompt_tokens=len(answer.handle.request.prompt))
        if answer.asked.stream:
            return _Stream(self._service, answer, self._spell, state["log"])
        try:
            content = await while_there(request.receive, self._whole(answer))
        except BaseException as error:
            self._end(answer, state["log"], "abort" if isinstance(error, ClientGone) else "error")
            raise
        self._end(answer, state["log"], answer.finish_reason)
        return Response(content, media_type="application/json")

    async def _begun(self, request: Request) -> Answer:
        state, service = request.scope["state"], self._service
        service.require_ready()
        with self._bodies.room() as body:
            asked = await service.read(await body.read(state["headers"], request.receive))
            begin = service.start(asked, state["headers"], state["client"], state["came"])
            return await while_there(request.receive, begin)

    async def _whole(self, answer: Answer) -> bytes:
        events = []
        while (event := await answer.next_event()) is not None:
            events.append(event)
        return document(replies.completion(answer, events, self._spell))

    def _end(self, answer: Answer, log: dict[str, Any], reason: str) -> None:
        end(self._service, answer, log, reason)


class _Stream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, answer: Answer, spell: replies.Spell, log: dict[str, Any]) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service, self._answer, self._spell, self._log = service, answer, spell, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        reason = "abort"
        try:
            await while_there(receive, self._send_all(send))
            reason = self._answer.finish_reason
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            reason = "error"
            await self._fail(error, send)
        finally:
            end(self._service, self._answer, self._log, reason)

    async def _send_all(self, send: Send) -> None:
        answer = self._answer
        await self._put(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._event(send, replies.opening(answer))
        while True:
            if not await answer.wait(self._service.settings.ping):
                await self._data(send, _PING)
                continue
            event = await answer.next_event()
            if event is None:
                break
            if chunk := replies.piece(answer, event, self._spell):
                await self._event(send, chunk)
        for chunk in replies.closing(answer):
            await self._event(send, chunk)
        await self._put(send, {"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _fail(self, error: Exception, send: Send) -> None:
        """Say it in the stream, whose status has been sent already."""
        refusal = refusal_of(error)
        self._service.metrics.refused(refusal)
        self._log["error_code"] = refusal.code
        if refusal.http_status == 500:
            _log.error("an answer failed", exc_info=error)
        await self._put(
            send, {"type": "http.response.body", "body": replies.sent_event(refusal.body), "more_body": False}
        )

    async def _event(self, send: Send, content: dict[str, Any]) -> None:
        await self._data(send, replies.sent_event(content))

    async def _data(self, send: Send, content: bytes) -> None:
        await self._put(send, {"type": "http.response.body", "body": content, "more_body": True})

    async def _put(self, send: Send, message: dict[str, Any]) -> None:
        """Who does not take what is sent is as good as gone."""
        try:
            await asyncio.wait_for(send(message), self._service.settings.send_timeout)
        except asyncio.TimeoutError:
            raise ClientGone from None


def end(service: Service, answer: Answer, log: dict[str, Any], reason: str) -> None:
    """An answer was given, or nobody takes it any more."""
    log.update(finish_reason=reason, completion_tokens=len(answer.token_times), cached_tokens=answer.cached_tokens)
    service.end(answer, reason)


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled, and :class:`ClientGone` raised, once the client has gone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watch):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
