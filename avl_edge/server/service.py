"""From a request that was read to an answer on its way: who is taken, what is prepared where, and what is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ..errors import BadInput, DeadlineExceeded
from ..serving.runtime import Runtime
from .answer import Answer
from .asking import check_model, check_tools, options_of, urgency_of
from .conversation import conversation_of
from .held_pictures import HeldPictures, Prepared
from .metrics import Metrics
from .pace import Pace
from .pictures import SentPictures
from .refusals import Refusal
from .settings import Settings
from .wire import ChatRequest, parse

T = TypeVar("T")
_log = logging.getLogger("avl_edge.server")
_THREADS = 4
_TRIES = 3


class Service:
    """Answers by ``runtime`` within ``settings``. Of one event loop."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime = runtime
        self.settings = settings
        self.state = "loading"
        self.sent = SentPictures(settings.picture_bytes)
        self.held = HeldPictures(runtime, settings.held_pictures)
        self.metrics = Metrics(settings.names[0])
        self.pace = Pace()
        self.submitted = 0
        """How many requests the engine was given."""
        self._on_their_way = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="avl-edge prepare")

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return self.settings.names

    @property
    def on_their_way(self) -> int:
        """How many requests were taken and have not ended."""
        return self._on_their_way

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def require_ready(self) -> None:
        """:class:`Refusal` while the model is loaded, and once the service ends."""
        if self.state != "ready":
            what = "the model is being loaded" if self.state == "loading" else "the service is ending"
            raise Refusal(503, f"{what}: ask again later", code=self.state, retry_after=1)

    async def read(self, body: bytes) -> ChatRequest:
        """The request in ``body``, of a model that is served here."""
        asked = await self.in_thread(partial(parse, body))
        check_model(asked, self.settings.names)
        return asked

    async def start(self, asked: ChatRequest, headers: dict[str, str], client: str, came: float) -> Answer:
        """Take a request, prepare it and submit it. Its answer is to be given to :meth:`end`.

        Raises :class:`Refusal` where too many are on their way or a field cannot be served, and what preparing raises,
        and what ends it before its first token or within the time after which a silent stream gets a comment.
        """
        self.require_ready()
        if self._on_their_way >= self.settings.max_queue:
            wait = self.metrics.usual_seconds * self._on_their_way / 4
            said = f"{self._on_their_way} requests are on their way already: ask again later"
            raise Refusal(429, said, code="queue_full", retry_after=min(max(wait, 0.1), 60))
        self._on_their_way += 1
        try:
            return await self._submitted(asked, headers, client, came)
        except BaseException:
            self._on_their_way -= 1
            raise

    async def _submitted(self, asked: ChatRequest, headers: dict[str, str], client: str, came: float) -> Answer:
        urgency = urgency_of(asked, headers)
        for _ in range(_TRIES):
            prepared = await self.in_thread(lambda: self._prepare(asked, client))
            left = None if urgency.deadline is None else urgency.deadline - (time.perf_counter() - came)
            if left is not None and left <= 0:
                raise DeadlineExceeded("the deadline passed before the request could be begun: give more time")
            cached = prepared.cached_tokens
            if left is not None and urgency.late == "refuse":
                self.pace.require(len(prepared.request.prompt) - cached, left)
            try:
                submit = partial(self.runtime.submit, prepared.request, priority=urgency.priority, deadline=left)
                # A grammar takes its time to be made.
                is_plain = prepared.request.options.json_schema is None
                generation = submit() if is_plain else await self.in_thread(submit)
            except BadInput:
                if prepared.is_lost:
                    continue
                raise
            self.submitted += 1
            # What was sent is let go of, pictures included: an answer needs the other fields alone.
            answer = Answer(
                asked.model_copy(update={"messages": []}), prepared, generation.handle, urgency, came, cached
            )
            try:
                await answer.wait(self.settings.ping)
            except BaseException as error:
                answer.close()
                self._forget_unready(answer)
                if isinstance(error, BadInput) and prepared.is_lost:
                    continue
                raise
            return answer
        raise Refusal(503, "the pictures' rows were taken by others: send it again", code="busy", retry_after=1)

    def _prepare(self, asked: ChatRequest, client: str) -> Prepared:
        check_tools(asked)
        options = options_of(asked, self.settings.max_tokens)
        return self.held.prepare(conversation_of(asked, self.sent, client, self.settings), options)

    def end(self, answer: Answer, outcome: str) -> None:
        """Its answer was given, or nobody wants it any more: ``stop``, ``length``, ``abort`` or ``error``."""
        self._on_their_way -= 1
        answer.close()
        self._forget_unready(answer)
        self.pace.add(answer)
        self.metrics.ended(answer, outcome)

    def _forget_unready(self, answer: Answer) -> None:
        session = answer.prepared.session
        if session and not session.is_ready:
            self.held.forget(session)
