"""Pictures whose rows are kept for later questions, of whichever client, so that each is paid for once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..config import Options
from ..errors import BadImage, BadInput, TooLarge
from ..serving.image_session import ImageSession
from ..serving.requests import Request
from ..serving.runtime import Runtime
from .conversation import Conversation, Said

_TRIES = 3
_Key: TypeAlias = tuple[Hashable, Hashable]


@dataclass(frozen=True)
class Prepared:
    """A request that may be submitted, and the pictures' rows that it reads (None: rows of its own)."""

    request: Request
    session: ImageSession | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the rows went to others before it could be submitted: prepare it again."""
        return self.session is not None and not self.session.is_open

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt need not be run."""
        prefix = self.request.prefix
        return len(prefix.prompt) if prefix and prefix.is_ready else 0


class HeldPictures:
    """Image sessions of ``runtime``, at most ``most`` of them, by what is in the pictures and how rows are stored.

    Their rows stay under the pool's promise: the engine closes those that were unused longest where it needs the pages.
    Any thread may use it; one picture that two ask about at once is opened once.
    """

    def __init__(self, runtime: Runtime, most: int) -> None:
        self._runtime = runtime
        self._most = most
        self._lock = threading.Lock()
        self._sessions: OrderedDict[_Key, ImageSession] = OrderedDict()
        self._opening: dict[_Key, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """What the rows of all of them take, in bytes."""
        with self._lock:
            return sum(each.peak_bytes for each in self._sessions.values() if each.is_open and each.is_ready)

    def prepare(self, asked: Conversation, options: Options) -> Prepared:
        """A question, checked and planned. Raises as :meth:`avl_edge.Runtime.prepare`."""
        if asked.pictures and self._most and options.kv_budget is None:
            for _ in range(_TRIES):
                if prepared := self._prepare_held(asked, options):
                    return prepared
        return Prepared(self._runtime.prepare_chat(asked.messages, options))

    def _prepare_held(self, asked: Conversation, options: Options) -> Prepared | None:
        """None where such pictures or settings share no rows, or the rows went while it was prepared."""
        try:
            session = self._session(asked, options)
            return Prepared(session.prepare(asked.after_pictures, options), session)
        except BadImage:
            raise
        except (BadInput, TooLarge):
            return None  # what is wrong with the request itself, preparing it alone says again

    def _session(self, asked: Conversation, options: Options) -> ImageSession:
        head = asked.up_to_pictures
        said = tuple((each.role, len(each.pictures), each.text) for each in head)
        key = (tuple(each.digest for each in asked.pictures), (said, _kind(options)))
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            try:
                return self._found(key) or self._opened(head, key, options)
            finally:
                with self._lock:
                    self._opening.pop(key, None)

    def _found(self, key: _Key) -> ImageSession | None:
        with self._lock:
            session = self._sessions.get(key)
            if session is None or not session.is_open:
                self._sessions.pop(key, None)
                return None
            self._sessions.move_to_end(key)
            return session

    def _opened(self, head: Sequence[Said], key: _Key, options: Options) -> ImageSession:
        only_rows = Options(
            method=options.method, parameters=options.parameters, formats=options.formats, preset=options.preset
        )
        session = self._runtime.open_chat([each.message for each in head], only_rows, spare=True)
        dropped = []  # closed by their finalizers, outside of the lock
        with self._lock:
            # The same pixels may come in other files.
            alike = [each for known, each in self._sessions.items() if known[1] == key[1] and each.is_open]
            twin = next((each for each in alike if each.digests == session.digests), None)
            self._sessions[key] = twin or session
            dropped += [self._sessions.pop(each) for each, old in list(self._sessions.items()) if not old.is_open]
            while len(self._sessions) > self._most:
                dropped.append(self._sessions.popitem(last=False)[1])
        return twin or session

    def forget(self, session: ImageSession) -> None:
        """Drop one, for example whose pictures nobody's question has run: what it holds are pixels."""
        with self._lock:
            for key in [key for key, each in self._sessions.items() if each is session]:
                del self._sessions[key]

    def clear(self) -> None:
        """Drop all of them."""
        with self._lock:
            self._sessions.clear()


def _kind(options: Options) -> Hashable:
    return (options.method, tuple(sorted(options.parameters.items())), options.formats, options.preset)
