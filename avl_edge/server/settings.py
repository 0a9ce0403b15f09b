"""What whoever starts the service decides: names, limits, times."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import require

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Limits of the service. Sizes are bytes, times seconds.

    ``names`` are those that clients may call the model by, the first one that it is listed under. ``hosts`` are the
    names that a request's Host header may have, so that no web page of another name reaches a service of this machine;
    empty: any. ``max_queue`` requests may be on their way, ``max_connections`` open; ``max_body_total`` is what the
    bodies of all of them may have together. ``max_pictures`` and ``max_pixels`` are for one request, pictures of
    earlier turns included. ``picture_bytes``: of pictures, as they were sent, that are kept for parts that refer to
    them. ``held_pictures``: so many conversations' pictures keep their rows. ``max_tokens``: of an answer that asks for
    no number. ``header_timeout``: until a connection has sent the head of a request, ``body_timeout`` its body,
    ``send_timeout`` until a reader takes what was sent. After ``ping`` a silent stream gets a comment.
    ``drain``: how long requests may go on after SIGTERM.
    """

    names: tuple[str, ...] = ("demo",)
    hosts: frozenset[str] = frozenset()
    max_queue: int = 64
    max_connections: int = 512
    max_body: int = 32 * MIB
    max_body_total: int = 128 * MIB
    max_messages: int = 256
    max_pictures: int = 16
    max_pixels: int = 64_000_000
    picture_bytes: int = 64 * MIB
    held_pictures: int = 16
    max_tokens: int = 256
    header_timeout: float = 20.0
    body_timeout: float = 60.0
    send_timeout: float = 30.0
    ping: float = 10.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        require(bool(self.names) and all(self.names), "the service needs a name for its model")
        for name in (
            "max_queue",
            "max_connections",
            "max_body",
            "max_pictures",
            "max_pixels",
            "max_tokens",
            "max_messages",
        ):
            require(getattr(self, name) >= 1, f"{name.replace('_', '-')} must be at least 1")
        for name in ("picture_bytes", "held_pictures", "drain"):
            require(getattr(self, name) >= 0, f"{name.replace('_', '-')} must not be negative")
