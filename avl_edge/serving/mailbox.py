"""What is asked of the engine's thread, from any other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

Message = Callable[[], None]
"""Called by the engine's thread between two layers or steps; once more where an interrupt cut it short."""


class Mailbox:
    """Messages in the order in which they were posted.

    :meth:`post` takes no lock that anybody could hold: the garbage collector may run a finalizer, which posts, in any
    thread, at any moment, also in the middle of another post.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()

    def post(self, message: Message) -> None:
        """Leave a message and return at once."""
        self._messages.append(message)
        self._bell.put(None)

    @property
    def has_mail(self) -> bool:
        """Whether there are messages that were not heard yet."""
        return bool(self._messages)

    def hear(self) -> None:
        """Call every message. What one raises comes out, and that one is done; an interrupt leaves it for next time."""
        while self._messages:
            try:
                self._messages[0]()
            except Exception:
                self._messages.popleft()
                raise
            self._messages.popleft()

    def wait(self, timeout: float | None = None) -> None:
        """Until somebody posts, or ``timeout`` seconds have passed; at times for shorter."""
        try:
            self._bell.get(timeout=timeout)
            while True:
                self._bell.get_nowait()
        except Empty:
            pass
