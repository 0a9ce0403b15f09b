"""From messages on the wire to a conversation with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BadImage
from ..model.images import image_size
from ..model.prompt import Message
from .pictures import SentPicture, SentPictures
from .refusals import Refusal
from .settings import Settings
from .wire import AssistantMessage, CameraPart, ChatRequest, ImagePart, SystemMessage, ToolMessage, UserMessage
from .wire import Message as WireMessage


@dataclass(frozen=True)
class Said:
    """What one side said. A message's pictures stand before its text: what is asked about them then does not change
    what they are to the model, and their rows serve every question."""

    role: str
    pictures: tuple[SentPicture, ...]
    text: str

    @property
    def message(self) -> Message:
        """As the runtime takes it."""
        text = (self.text,) if self.text else ()
        return Message(self.role, [*(each.content for each in self.pictures), *text])


@dataclass(frozen=True)
class Conversation:
    """All of it, of which the answer to the last message is wanted."""

    said: tuple[Said, ...]

    @property
    def pictures(self) -> list[SentPicture]:
        """Of all messages, in their order."""
        return [picture for each in self.said for picture in each.pictures]

    @property
    def messages(self) -> list[Message]:
        """As the runtime takes them."""
        return [each.message for each in self.said]

    @property
    def last_shown(self) -> int:
        """The number of the last message with a picture."""
        return max(number for number, each in enumerate(self.said) if each.pictures)

    @property
    def up_to_pictures(self) -> list[Said]:
        """What was said and shown up to the last picture."""
        *before, last = self.said[: self.last_shown + 1]
        return [*before, Said(last.role, last.pictures, "")]

    @property
    def after_pictures(self) -> list[Message]:
        """What follows on the last picture."""
        last, *others = self.said[self.last_shown :]
        return [Said(last.role, (), last.text).message, *(each.message for each in others)]


def conversation_of(asked: ChatRequest, sent: SentPictures, client: str, settings: Settings) -> Conversation:
    """What ``asked`` shows and says; :class:`Refusal` naming the message that cannot be served."""
    if len(asked.messages) > settings.max_messages:
        said = f"there are more than {settings.max_messages} messages: send the last ones"
        raise Refusal(413, said, param="messages", code="too_large", retries=False)
    reader = _Reader(sent, client, settings)
    return Conversation(tuple(reader.said(each, f"messages.{n}") for n, each in enumerate(asked.messages)))


class _Reader:
    def __init__(self, sent: SentPictures, client: str, settings: Settings) -> None:
        self._sent, self._client, self._settings = sent, client, settings
        self._pictures = self._pixels = 0

    def said(self, message: WireMessage, where: str) -> Said:
        match message:
            case SystemMessage():
                return Said("system", (), _text(message.content))
            case AssistantMessage():
                if message.tool_calls:
                    raise _unsupported(f"{where}.tool_calls", "this model's template has no tools")
                return Said("assistant", (), _text(message.content or message.refusal or ""))
            case ToolMessage():
                raise _unsupported(f"{where}.role", "this model's template has no tools")
            case UserMessage():
                return self._of_user(message, where)

    def _of_user(self, message: UserMessage, where: str) -> Said:
        if isinstance(message.content, str):
            return Said("user", (), message.content)
        pictures: list[SentPicture] = []
        texts: list[str] = []
        for number, part in enumerate(message.content):
            param = f"{where}.content.{number}"
            if isinstance(part, ImagePart):
                pictures.append(self._picture(part, f"{param}.image_url"))
            elif isinstance(part, CameraPart):
                raise Refusal(400, f"there is no camera {part.camera!r} here", param=param, code="unknown_camera")
            else:
                texts.append(part.text)
        return Said("user", tuple(pictures), "\n".join(texts))

    def _picture(self, part: ImagePart, param: str) -> SentPicture:
        self._pictures += 1
        if self._pictures > self._settings.max_pictures:
            said = f"there are more than {self._settings.max_pictures} pictures: send fewer"
            raise Refusal(413, said, param=param, code="too_many_pictures", retries=False)
        picture = self._sent.picture(part, self._client, param)
        try:
            width, height = image_size(picture.content)
        except BadImage as error:
            raise Refusal(422, str(error), param=param, code="invalid_image", retries=False) from None
        self._pixels += width * height
        if self._pixels > self._settings.max_pixels:
            said = (
                f"the pictures have more than {self._settings.max_pixels} pixels together: send smaller ones or fewer"
            )
            raise Refusal(413, said, param=param, code="too_many_pixels", retries=False)
        return picture


def _text(content: str | Sequence[object]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(getattr(each, "text", "")) for each in content)


def _unsupported(param: str, why: str) -> Refusal:
    return Refusal(400, f"{param}: {why}", param=param, code="unsupported_value")
