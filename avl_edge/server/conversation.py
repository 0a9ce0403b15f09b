"""From messages on the wire to what the model is asked."""

from __future__ import annotations

from dataclasses import dataclass

from .pictures import SentPicture, SentPictures
from .refusals import Refusal
from .settings import Settings
from .wire import ChatRequest, ImagePart, TextPart, UserMessage


@dataclass(frozen=True)
class Conversation:
    """The pictures, in order, and the text of a question about them."""

    pictures: tuple[SentPicture, ...]
    question: str


def conversation_of(asked: ChatRequest, sent: SentPictures, client: str, settings: Settings) -> Conversation:
    """What ``asked`` shows and says; :class:`Refusal` naming the message that cannot be served."""
    if len(asked.messages) > settings.max_messages:
        raise Refusal(
            413, f"there are more than {settings.max_messages} messages: send the last ones", param="messages"
        )
    pictures: list[SentPicture] = []
    texts: list[str] = []
    for number, message in enumerate(asked.messages):
        where = f"messages.{number}"
        if not isinstance(message, UserMessage):
            said = f"{where} is of the role {message.role}, which the model is not given: send the user's messages"
            raise Refusal(400, said, param=f"{where}.role", code="unsupported_value")
        parts = message.content
        if isinstance(parts, str):
            texts.append(parts)
            continue
        for place, part in enumerate(parts):
            param = f"{where}.content.{place}"
            if isinstance(part, TextPart):
                texts.append(part.text)
            elif isinstance(part, ImagePart):
                if len(pictures) == settings.max_pictures:
                    said = f"there are more than {settings.max_pictures} pictures: send fewer"
                    raise Refusal(413, said, param=param, code="too_many_pictures", retries=False)
                pictures.append(sent.picture(part, client, f"{param}.image_url"))
            else:
                raise Refusal(400, f"there is no camera {part.camera!r} here", param=param, code="unknown_camera")
    return Conversation(tuple(pictures), "\n".join(texts))
