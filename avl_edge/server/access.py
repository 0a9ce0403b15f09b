"""Who may ask, and how much may be sent: keys, names of this host, bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import BadInput, reason
from .refusals import Refusal
from .settings import Settings

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
OPEN_PATHS = frozenset({"/health"})
"""What needs no key."""
_KEY_FILE_BYTES = 65536


class ClientGone(Exception):
    """Who asked is not there any more."""


@dataclass
class Keys:
    """The API keys of a file, one a line; without a file everybody may ask. A key may be given as ``Bearer`` or, by a
    browser, as the password of ``Basic``."""

    path: Path | None
    _keys: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        self.load()

    def load(self) -> None:
        """Read the file, again too: :class:`BadInput` where it has no key, which leaves those of before."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                lines = file.read(_KEY_FILE_BYTES).split(b"\n")
        except OSError as error:
            raise BadInput(f"the file of API keys {str(self.path)!r} cannot be read: {reason(error)}") from None
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith(b"#"))
        if not keys:
            raise BadInput(f"the file of API keys {str(self.path)!r} has no key: write one in a line of its own")
        self._keys = keys

    def client(self, headers: Mapping[str, str]) -> str:
        """Who asks: a digest of the key that was given; :class:`Refusal` for none of ours."""
        if not self._keys:
            return ""
        given = _given(headers.get("authorization", ""))
        # Every key is compared, in a time that tells nothing of it.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            said = "give the API key of this service in the header Authorization: Bearer KEY"
            raise Refusal(401, said, code="invalid_api_key", retries=False)
        return hashlib.sha256(given).hexdigest()


def _given(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return value.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""


def check_host(headers: Mapping[str, str], hosts: frozenset[str]) -> None:
    """Raise :class:`Refusal` where a request was meant for another host: a web page may give its own name this
    machine's address, to reach what listens here."""
    if not hosts:
        return
    name = headers.get("host", "").strip().lower()
    name = name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]
    if name not in hosts:
        raise Refusal(403, "the Host header names no host of this service", code="invalid_host", retries=False)


class Bodies:
    """What the bodies of all requests take, and may take together, in bytes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.nbytes = 0

    def room(self) -> Body:
        """For one more; to be left once what it says is worked in."""
        return Body(self)


class Body:
    """The body of one request, counted until the end of a ``with``."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._own = bodies, 0

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.nbytes -= self._own

    async def read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """A JSON body. Raises :class:`Refusal` where it is no JSON by its type, too large, or comes too slowly, and
        :class:`ClientGone`."""
        settings = self._bodies.settings
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send the body as application/json", param="content-type", code="invalid_type")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.max_body:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._all(receive), settings.body_timeout)
        except asyncio.TimeoutError:
            said = f"the body did not come within {settings.body_timeout:g} s: send it again"
            raise Refusal(408, said, code="body_timeout") from None

    async def _all(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        bodies, settings = self._bodies, self._bodies.settings
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            self._own += len(chunk)
            bodies.nbytes += len(chunk)
            if self._own > settings.max_body:
                raise self._too_large()
            if bodies.nbytes > settings.max_body_total:
                raise Refusal(503, "others send much just now: send it again", code="busy", retry_after=1)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> Refusal:
        most = self._bodies.settings.max_body
        return Refusal(413, f"the body has more than {most} bytes: send less", code="too_large", retries=False)


def document(content: Mapping[str, Any]) -> bytes:
    """JSON as it is sent."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
