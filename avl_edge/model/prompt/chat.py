"""Conversations: who said what, and which pictures they showed with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

from ...config import Picture
from ...errors import BadInput, quoted
from ..images.frames import Frames, Shown, Source, check_shown
from ..images.sources import take_sources

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Part: TypeAlias = "str | Source"


@dataclass(frozen=True)
class Message:
    """What one side said. ``role``: system, user or assistant. ``content``: a text, or texts and pictures in their
    order; strings are texts, pictures are paths, bytes or Pillow images, and a video is :class:`Frames`. Only a user
    shows pictures."""

    role: str
    content: str | Sequence[Part]

    @property
    def parts(self) -> tuple[Part, ...]:
        """``content`` as several."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)


@dataclass(frozen=True)
class Turn:
    """A message whose pictures have been measured."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def texts(self) -> list[str]:
        """The texts among its parts."""
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures among its parts."""
        return [part for part in self.parts if isinstance(part, Picture)]

    def with_texts(self, texts: Iterator[str]) -> Turn:
        """The same with the next ones of ``texts`` in place of its own."""
        return replace(self, parts=tuple(next(texts) if isinstance(part, str) else part for part in self.parts))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise BadInput for anything but messages of known roles, of texts and, from a user, pictures."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise BadInput("messages must be a list of avl_edge.Message")
    for each in messages:
        if not isinstance(each, Message):
            raise BadInput(f"a message must be an avl_edge.Message, not {type(each).__name__}")
        if each.role not in (SYSTEM, USER, ASSISTANT):
            raise BadInput(f"a message's role must be system, user or assistant, not {quoted(each.role)}")
        if not isinstance(each.content, str) and (
            isinstance(each.content, bytes) or not isinstance(each.content, Sequence)
        ):
            raise BadInput("a message's content must be a text or a list of texts and pictures")
        shown = [part for part in each.parts if not isinstance(part, str)]
        if shown and each.role != USER:
            raise BadInput(f"a message of the {each.role} holds a picture: only a user shows pictures")
        check_shown(shown)


def shown_in(messages: Sequence[Message]) -> list[Shown]:
    """The pictures of all messages and the moments of videos, in their order; what comes from a stream is read."""
    shown: list[Shown] = []
    for part in (part for each in messages for part in each.parts if not isinstance(part, str)):
        shown += part.moments() if isinstance(part, Frames) else take_sources([part])
    return shown


def turns_of(messages: Sequence[Message], pictures: Sequence[Picture]) -> list[Turn]:
    """The messages, whose pictures were measured as ``pictures``, one after the other."""
    measured = iter(pictures)
    turns = []
    for each in messages:
        parts: list[str | Picture] = []
        for part in each.parts:
            count = len(part.moments()) if isinstance(part, Frames) else 1
            parts += [part] if isinstance(part, str) else islice(measured, count)
        turns.append(Turn(each.role, tuple(parts)))
    return turns


def one_question(pictures: Sequence[Picture], prompt: str, system: str | None = None) -> list[Turn]:
    """A single turn, the pictures before the text."""
    opening = [Turn(SYSTEM, (system,))] if system else []
    return [*opening, Turn(USER, (*pictures, prompt))]


def asked(turns: Sequence[Turn], *texts: str) -> list[Turn]:
    """The turns, whose last one goes on with ``texts``."""
    return [*turns[:-1], replace(turns[-1], parts=(*turns[-1].parts, *texts))]
