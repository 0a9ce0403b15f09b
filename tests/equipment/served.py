"""A service in a thread of the test's process, at a real socket, and a client of OpenAI's for it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from avl_edge import Runtime
from avl_edge.server.access import Keys
from avl_edge.server.process import Address, Process
from avl_edge.server.service import Service
from avl_edge.server.settings import Settings

LIMIT = 60.0
"""Seconds after which a wait counts as a hang."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Served:
    """A service that answers at ``port``."""

    service: Service
    process: Process
    port: int
    key_file: Path | None = None

    @property
    def runtime(self) -> Runtime:
        return self.service.runtime

    def client(self, key: str = "none", **named: Any) -> openai.OpenAI:
        """The official client, as its users make one."""
        named = {"max_retries": 0, "timeout": LIMIT, **named}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, **named)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and document of a request that no client library has a hand in."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(content) if is_json else content.decode()

    def post(self, body: dict[str, Any] | bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
        """A chat completion's request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", CHAT, content, {"content-type": "application/json", **headers})

    def connect(self) -> socket.socket:
        """A connection that says nothing yet."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT)

    def wait_until_idle(self) -> None:
        """Until every request has ended and given its rows back: those that are left are of pictures that are held."""
        assert wait_for(lambda: self.service.on_their_way == 0), "requests are on their way still"
        assert wait_for(lambda: not self.runtime.engine.call(lambda: self.runtime.debug.scheduler.requests))
        view = self.runtime.debug

        def check() -> None:
            caches = [each.cache for each in view.scheduler.prefixes if each.cache]
            view.pool.check_integrity([each.rows for each in caches])

        self.runtime.engine.call(check)


def wait_for(holds: Any, seconds: float = LIMIT) -> bool:
    """Whether ``holds()`` becomes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(
    model: str | Path,
    settings: Settings | None = None,
    key_file: Path | None = None,
    pool_bytes: int | None = None,
    **opened: Any,
) -> Iterator[Served]:
    """A service of ``model`` until the end of the block."""
    runtime = Runtime.open(model, **opened)
    service = Service(runtime, settings or Settings(names=("test",)))
    process = Process(service, Keys(key_file), partial(runtime.load_weights, pool_bytes=pool_bytes))
    listener = Address(port=0).listen()
    port = listener.getsockname()[1]
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(process.run(listener))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert wait_for(lambda: service.state != "loading" or failures), "the service does not get ready"
        assert not failures, failures
        yield Served(service, process, port, key_file)
    finally:
        process.stop()
        thread.join(LIMIT)
    assert not thread.is_alive(), "the service does not end"
    assert not failures, failures


def picture(colour: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    """A file of a picture of one colour, with a corner that is none."""
    image = Image.new("RGB", size, colour)
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    file = BytesIO()
    image.save(file, form)
    return file.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """A picture as clients send it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asking(question: str, *pictures: bytes, **fields: Any) -> dict[str, Any]:
    """The body of a request: the pictures and a question about them."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return {"model": "test", "messages": messages, "max_tokens": 8, **fields}


def raw_post(body: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    """A chat completion's request as it goes over the wire, which says that its body has ``length`` bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content) if length is None else length}\r\n\r\n".encode() + content
