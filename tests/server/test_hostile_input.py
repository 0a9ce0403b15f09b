"""What has gone wrong in other services, one test each: addresses, pictures, bodies, keys, connections."""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from avl_edge.server.settings import Settings
from tests.conftest import Checkpoints
from tests.equipment.served import CHAT, LIMIT, Served, asking, data_url, picture, raw_post, serving, wait_for

QUESTION, PICTURE = "What is it?", picture()


def _showing(url: Any, **part: Any) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": url if url is None else {"url": url}, **part}
    return {
        "model": "test",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}],
    }


def _png(width: int, height: int) -> bytes:
    """The head of a picture of such a size, and hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


class TestPictures:
    def test_no_address_is_fetched(self, served: Served) -> None:
        """Not even one that redirects, or is of this machine (vLLM's CVE-2026-24779 and others)."""
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)

        with HTTPServer(("127.0.0.1", 0), Handler) as other:
            Thread(target=other.serve_forever, daemon=True).start()
            for url in (f"http://127.0.0.1:{other.server_port}/a.png", "https://example.com/a.png", "ftp://a/b.png"):
                status, _, document = served.post(_showing(url))
                assert (status, document["error"]["code"]) == (400, "invalid_image_url")
                assert "is not fetched" in document["error"]["message"]
            other.shutdown()
        assert asked == []

    @pytest.mark.parametrize(
        "url", ["file:///etc/passwd", "/etc/passwd", "../a.png", "file:%2f%2fetc", "data:text/plain,a", "", "data:"]
    )
    def test_no_file_is_read(self, served: Served, url: str) -> None:
        status, _, document = served.post(_showing(url))
        assert (status, document["error"]["param"]) == (400, "messages.0.content.0.image_url")

    @pytest.mark.parametrize("size", [(52_800, 44), (44, 52_800), (40_000, 40_000), (0, 10), (2**31 - 1, 1)])
    def test_extreme_sizes_are_refused_by_their_headers(self, served: Served, size: tuple[int, int]) -> None:
        began = time.perf_counter()
        status, _, document = served.post(_showing(data_url(_png(*size))))
        assert (status, document["error"]["code"]) == (422, "invalid_image")
        assert time.perf_counter() - began < 5

    def test_a_picture_of_one_pixel_is_answered(self, served: Served) -> None:
        assert served.post(asking(QUESTION, picture(size=(1, 1))))[0] == 200

    @pytest.mark.parametrize("form", ["GIF", "TIFF", "ICO", "PPM"])
    def test_formats_that_nobody_asked_for_are_refused(self, served: Served, form: str) -> None:
        assert served.post(asking(QUESTION, picture(form=form)))[0] == 422

    @pytest.mark.parametrize(
        "content", [b"", b"\x80\x04\x95\x10\0\0\0", b"PK\x03\x04", b"<svg/>", PICTURE[:50], PICTURE[:-60]]
    )
    def test_what_is_no_picture_is_refused_without_addresses(self, served: Served, content: bytes) -> None:
        """Pickles and archives among it; no text of a decoder with an address in memory."""
        status, _, document = served.post(_showing(data_url(content)))
        assert status == 422
        assert "0x" not in document["error"]["message"]

    def test_a_request_has_so_many_pictures(self, served: Served) -> None:
        status, headers, document = served.post(asking(QUESTION, *[PICTURE] * 17))
        assert (status, document["error"]["code"]) == (413, "too_many_pictures")
        assert headers["x-should-retry"] == "false"

    def test_a_request_s_pictures_have_so_many_pixels(self, checkpoint: Checkpoints) -> None:
        with serving(checkpoint("mistral-gqa"), Settings(names=("test",), max_pixels=6000)) as served:
            assert served.post(asking(QUESTION, PICTURE))[0] == 200
            status, _, document = served.post(asking(QUESTION, PICTURE, PICTURE))
            assert (status, document["error"]["code"]) == (413, "too_many_pixels")

    def test_no_tensors_are_taken(self, served: Served) -> None:
        """Embeddings of a client's own (CVE-2025-62164 and others)."""
        for part in ({"type": "image_embeds", "image_embeds": "AAAA"}, {"type": "audio_url", "audio_url": {"url": ""}}):
            body = {"model": "test", "messages": [{"role": "user", "content": [part]}]}
            status, _, document = served.post(body)
            assert (status, document["error"]["param"]) == (400, "messages.0.content.0")
        assert served.post(asking(QUESTION, prompt_embeds="AAAA"))[0] == 400

    def test_a_picture_without_bytes_has_to_be_known(self, served: Served) -> None:
        status, _, document = served.post(_showing(None, uuid="never"))
        assert (status, document["error"]["code"]) == (404, "picture_not_found")
        assert served.post(_showing(None))[0] == 400


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"a"',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"model":"test"}',
            b'{"model":"test","messages":[]}',
            b'{"model":"test","messages":[{"role":"user"}]}',
            b'{"model":"test","messages":[{"role":"wizard","content":"a"}]}',
            b'{"model":"test","messages":[{"role":"user","content":"\\ud800"}]}',
            b'{"model":"test","messages":[{"role":"user","content":"a"}],"temperature":NaN}',
            b'{"model":"test","messages":[{"role":"user","content":"a"}],"seed":99999999999999999999999999}',
            b'{"model":"test","messages":[{"role":"user","content":"a"}],"max_tokens":0}',
            b'{"model":"test","messages":[{"role":"user","content":"a"}],"n":2}',
            b'{"model":"test","messages":[{"role":"user","content":"a"}],"logit_bias":{"x":1}}',
            b'{"model":"test","messages":[{"role":"user","content":""}]}',
            b'{"model":"test","messages":[{"role":"user","content":[]}]}',
        ],
        ids=lambda body: body[:80].decode("latin-1"),
    )
    def test_what_is_no_request_is_refused_in_openai_s_shape(self, served: Served, body: bytes) -> None:
        status, headers, document = served.post(body)
        assert status == 400
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert headers["x-request-id"]

    def test_a_body_has_to_be_declared_as_json(self, served: Served) -> None:
        """What a web page may send unasked is no JSON by its type."""
        content = json.dumps(asking(QUESTION)).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            assert served.request("POST", CHAT, content, {"content-type": kind})[0] == 415

    def test_a_body_has_so_many_bytes(self, checkpoint: Checkpoints) -> None:
        with serving(checkpoint("mistral-gqa"), Settings(names=("test",), max_body=1000)) as served:
            assert served.post(asking("a" * 2000))[0] == 413
            with served.connect() as connection:  # that does not say how many there will be
                head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def test_a_half_sent_body_is_waited_for_in_vain(self, checkpoint: Checkpoints) -> None:
        settings = Settings(names=("test",), body_timeout=0.3)
        with serving(checkpoint("mistral-gqa"), settings) as served, served.connect() as connection:
            connection.sendall(raw_post(b"{", 1000))
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
            assert served.post(asking(QUESTION))[0] == 200

    def test_a_body_whose_sender_left_is_forgotten(self, served: Served) -> None:
        with served.connect() as connection:
            connection.sendall(raw_post(b"{", 1000))
        assert served.post(asking(QUESTION))[0] == 200
        served.wait_until_idle()


@pytest.fixture(scope="module")
def locked(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# for the dashboard\nfirst\n\nsecond\n")
    with serving(checkpoint("mistral-gqa"), key_file=keys) as served:
        yield served


class TestKeys:
    PATHS = ("/v1/models", "/v1/models/test", "/metrics", "/openapi.json", "/health/ready", "/", "/nothing")

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Bearer # for the dashboard", "Basic a", "first"])
    def test_every_path_asks_for_one(self, locked: Served, path: str, header: str) -> None:
        status, headers, document = locked.request("GET", path, headers={"authorization": header} if header else {})
        assert (status, document["error"]["code"]) == (401, "invalid_api_key")
        assert "www-authenticate" in headers

    def test_a_question_asks_for_one(self, locked: Served) -> None:
        assert locked.post(asking(QUESTION))[0] == 401
        assert locked.post(asking(QUESTION), authorization="Bearer first")[0] == 200
        assert locked.client("second").models.list().data
        basic = base64.b64encode(b"anybody:second").decode()
        assert locked.request("GET", "/v1/models", headers={"authorization": f"Basic {basic}"})[0] == 200

    def test_whether_it_is_alive_everybody_may_know(self, locked: Served) -> None:
        assert locked.request("GET", "/health")[0] == 200

    def test_a_picture_is_known_to_who_sent_it(self, locked: Served) -> None:
        assert locked.post(_showing(data_url(PICTURE), uuid="mine"), authorization="Bearer first")[0] == 200
        assert locked.post(_showing(None, uuid="mine"), authorization="Bearer first")[0] == 200
        assert locked.post(_showing(None, uuid="mine"), authorization="Bearer second")[0] == 404

    def test_a_file_without_keys_locks_nobody_out(self, locked: Served) -> None:
        """Read again on SIGHUP, broken: the keys of before hold."""
        keys = locked.key_file
        assert keys is not None
        before = keys.read_text()
        try:
            keys.write_text("# none\n")
            locked.process.reload()
            assert locked.post(asking(QUESTION), authorization="Bearer first")[0] == 200
            keys.write_text("third\n")
            locked.process.reload()
            assert locked.post(asking(QUESTION), authorization="Bearer first")[0] == 401
            assert locked.post(asking(QUESTION), authorization="Bearer third")[0] == 200
        finally:
            keys.write_text(before)
            locked.process.reload()


class TestHosts:
    def test_a_web_page_s_name_is_no_name_of_this_host(self, checkpoint: Checkpoints) -> None:
        settings = Settings(names=("test",), hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
        with serving(checkpoint("mistral-gqa"), settings) as served:
            for host in ("evil.example", "localhost.evil.example", "", "127.0.0.2:80", "[::2]:80"):
                assert served.request("GET", "/v1/models", headers={"host": host})[0] == 403
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
                assert served.request("GET", "/v1/models", headers={"host": host})[0] == 200


class TestPaths:
    @pytest.mark.parametrize("path", ["/", "/v1/../etc/passwd", "/%2e%2e/etc/passwd", "/v1/completions", "/docs", "//"])
    def test_there_is_nothing_else(self, served: Served, path: str) -> None:
        status, _, document = served.request("GET", path)
        assert (status, document["error"]["code"]) == (404, "not_found")

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
    def test_a_path_has_its_methods(self, served: Served, method: str) -> None:
        status, headers, document = served.request(method, CHAT)
        assert (status, headers["allow"], document["error"]["code"]) == (405, "POST", "method_not_allowed")

    def test_a_request_keeps_its_sound_id(self, served: Served) -> None:
        assert served.request("GET", "/health", headers={"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
        assert served.request("GET", "/health", headers={"x-request-id": "a b\t"})[1]["x-request-id"] != "a b"


class TestConnections:
    def test_silent_ones_make_room(self, checkpoint: Checkpoints) -> None:
        """The one that has been silent longest goes first, and who asks is heard."""
        settings = Settings(names=("test",), max_connections=20)
        with serving(checkpoint("mistral-gqa"), settings) as served:
            silent = [served.connect() for _ in range(200)]
            assert served.post(asking(QUESTION))[0] == 200
            assert sum(_is_open(each) for each in silent) < 20
            for each in silent:
                each.close()

    @pytest.mark.parametrize("said", [b"", b"POST / HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: "])
    def test_half_a_head_is_waited_for_in_vain(self, checkpoint: Checkpoints, said: bytes) -> None:
        settings = Settings(names=("test",), header_timeout=0.2)
        with serving(checkpoint("mistral-gqa"), settings) as served, served.connect() as connection:
            connection.sendall(said)
            for _ in range(3):  # what trickles in does not put it off
                time.sleep(0.1)
                if said and _is_open(connection):
                    connection.sendall(b"a")
            assert wait_for(lambda: not _is_open(connection), 5)

    def test_what_is_no_http_is_closed(self, served: Served) -> None:
        with served.connect() as connection:
            connection.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")

    def test_a_reader_that_stops_reading_is_left(self, checkpoint: Checkpoints) -> None:
        """What was made for it ends, and others do not notice."""
        settings = Settings(names=("test",), send_timeout=0.2)
        with serving(checkpoint("mistral-gqa"), settings) as served, served.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            fields = {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 20}
            connection.sendall(raw_post(asking(QUESTION, **fields)))
            assert wait_for(lambda: served.service.on_their_way == 1, LIMIT)
            assert served.post(asking(QUESTION))[0] == 200
            served.wait_until_idle()


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.setblocking(True)
