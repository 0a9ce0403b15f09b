"""The pictures of a request: from data URLs to the bytes of files, within what one request may send.

Nothing is fetched: an address of a web server, a file or anything else but ``data:`` is refused by its kind alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass

from .refusals import Refusal
from .wire import ImagePart, ImageUrl

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,32})?(;[a-z0-9=.+-]{1,64})?;base64,", re.IGNORECASE)
_MOST_NAMES = 4096


@dataclass(frozen=True, eq=False)
class SentPicture:
    """A picture as a client sent it; ``digest`` is that of its bytes."""

    content: bytes
    digest: str


class SentPictures:
    """Pictures that were sent lately, at most ``most`` bytes of them, for parts that refer to one by its ``uuid``.

    Any thread may use it. Who sent a picture is part of its name: no client reaches those of another one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._pictures: OrderedDict[str, SentPicture] = OrderedDict()
        self._names: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.nbytes = 0

    def picture(self, part: ImagePart, client: str, param: str) -> SentPicture:
        """What ``part`` of a request of ``client`` shows; :class:`Refusal`, naming ``param``."""
        url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
        if url is None:
            return self._known(part.uuid, client, param)
        content = decoded(url, param)
        picture = SentPicture(content, hashlib.sha256(content).hexdigest())
        if part.uuid is not None:
            self._keep(picture, client, part.uuid)
        return picture

    def _known(self, uuid: str | None, client: str, param: str) -> SentPicture:
        if uuid is None:
            raise Refusal(400, f"{param} has no picture: give a data URL, or the uuid of one sent before", param=param)
        with self._lock:
            digest = self._names.get((client, uuid))
            picture = self._pictures.get(digest) if digest else None
            if picture is None or digest is None:
                raise Refusal(
                    404,
                    f"the picture {uuid!r} is not here: it was never sent, or others have taken its place since; send "
                    "it again with its bytes",
                    param=param,
                    code="picture_not_found",
                )
            self._pictures.move_to_end(digest)
        return picture

    def _keep(self, picture: SentPicture, client: str, uuid: str) -> None:
        if len(picture.content) > self._most:
            return
        with self._lock:
            if picture.digest not in self._pictures:
                self._pictures[picture.digest] = picture
                self.nbytes += len(picture.content)
            self._pictures.move_to_end(picture.digest)
            self._names[client, uuid] = picture.digest
            self._names.move_to_end((client, uuid))
            while self.nbytes > self._most:
                _, oldest = self._pictures.popitem(last=False)
                self.nbytes -= len(oldest.content)
            while len(self._names) > _MOST_NAMES:
                self._names.popitem(last=False)


def decoded(url: str, param: str) -> bytes:
    """The bytes of a data URL; :class:`Refusal` for any other, and for what is no base64."""
    head = _DATA_URL.match(url[:256])
    if head is None:
        kind = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]{0,15}:", url[:32])
        said = f"an address of {kind[0]} is not fetched" if kind and kind[0].lower() != "data:" else "it is none"
        raise Refusal(
            400,
            f"{param} must be a data URL of a picture, data:image/jpeg;base64,..., and {said}",
            param=param,
            code="invalid_image_url",
        )
    text = url[head.end() :]
    try:
        # What it is a picture of, if any, its first bytes say: the URL's word for it does not count.
        return base64.b64decode("".join(text.split()) if "\n" in text else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            400, f"{param} is no valid base64: send it again", param=param, code="invalid_image_url"
        ) from None
