"""``--system``, ``--history`` and ``--frames`` of ``avl-edge run``: what was said and shown before the question."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ..config import format_size
from ..errors import BadInput, quoted, reason
from ..files import read_bytes
from ..model.images import Frames, ImageSource, Source
from ..model.prompt import Message
from .sources import picture, questions

HISTORY_BYTES = 2**26

System: TypeAlias = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the model is told before anything else, - for stdin or @FILE.")
]
History: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Earlier turns: a JSON list of messages as in OpenAI's chat completions."),
]
VideoFrames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--frames", metavar="FILE", help="A frame of a video, before the pictures; given for each, in order."),
]
Fps: TypeAlias = Annotated[float, typer.Option(help="How many --frames a second has.")]
_FORM = 'a list of {"role": "user", "content": "..."}'


def video(frames: list[str] | None, fps: float) -> list[Source]:
    """The video of ``--frames``; nothing without."""
    return [Frames.of([picture(each) for each in frames], fps)] if frames else []


def said_before(system: str | None, history: str | None) -> list[Message]:
    """Messages of a system text and of a file; :class:`BadInput` says what is wrong with it."""
    before = [] if system is None else [Message("system", questions([system])[0])]
    if history is None:
        return before
    said = _messages(Path(history))
    if before and any(each.role == "system" for each in said):
        raise BadInput("--history has a system message: leave --system out")
    return [*before, *said]


def _messages(path: Path) -> list[Message]:
    try:
        with path.open("rb") as file:
            content = read_bytes(file, HISTORY_BYTES)
    except OSError as error:
        raise BadInput(f"--history {str(path)!r} cannot be read ({reason(error)}): give {_FORM} as JSON") from None
    if content is None:
        raise BadInput(f"--history {str(path)!r} has more than {format_size(HISTORY_BYTES)}: give fewer turns")
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--history {str(path)!r} is not valid JSON ({reason(error)}): give {_FORM}") from None
    if not isinstance(said, list):
        raise BadInput(f"--history {str(path)!r} must be {_FORM}")
    return [_message(each, path.parent, f"message {number} of --history") for number, each in enumerate(said, 1)]


def _message(said: Any, directory: Path, name: str) -> Message:
    if not isinstance(said, Mapping) or not isinstance(said.get("role"), str):
        raise BadInput(f'{name} must have a "role" and a "content", not {quoted(said)}')
    content = said.get("content")
    if isinstance(content, str):
        return Message(said["role"], content)
    if not isinstance(content, list):
        raise BadInput(f"the content of {name} must be a text or a list of parts, not {quoted(content)}")
    return Message(said["role"], [_part(each, directory, name) for each in content])


def _part(part: Any, directory: Path, name: str) -> str | ImageSource:
    kind = part.get("type") if isinstance(part, Mapping) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        return value
    url = value.get("url") if isinstance(value, Mapping) else value
    if kind not in ("image_url", "image") or not isinstance(url, str):
        raise BadInput(
            f'a part of {name} must be {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": '
            f'{{"url": FILE}}}}, not {quoted(part)}'
        )
    if not url.startswith("data:"):
        return directory / picture(url.removeprefix("file://"))
    _, encoded, content = url.partition(";base64,")
    try:
        return base64.b64decode(content if encoded else "!", validate=True)
    except binascii.Error:
        raise BadInput(f"a picture of {name} is no data:image/...;base64,... of valid base64") from None
