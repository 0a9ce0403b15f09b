"""The service as a process: what it says while it loads, what systemd hears, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from avl_edge import Runtime
from avl_edge.cli import run_app
from avl_edge.errors import BadInput, BadModel
from avl_edge.server.access import Keys
from avl_edge.server.frame import JsonLines
from avl_edge.server.process import Address, Process
from avl_edge.server.service import Service
from avl_edge.server.settings import Settings
from tests.conftest import Checkpoints
from tests.equipment.served import LIMIT, Served, asking, picture, raw_post, serving, wait_for
from tests.equipment.slow_backend import stopped

QUESTION, PICTURE = "What is it?", picture()


@pytest.fixture(scope="module")
def told(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs one at a UNIX socket, has it stopped in the middle of 16 answers, and tells what came of it."""
    folder = tmp_path_factory.mktemp("service")
    path, notify = folder / "socket", folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        hears.bind(str(notify))
        heard: list[str] = []
        threading.Thread(target=_hear, args=(hears, heard), daemon=True).start()
        command = [sys.executable, "-m", "avl_edge", "serve", "--model", str(checkpoint("mistral-gqa"))]
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(notify),
            "WATCHDOG_USEC": "200000",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [*command, "--socket", str(path), "--name", "test"], stderr=subprocess.PIPE, text=True, env=environment
        )
        assert wait_for(lambda: heard)
        told: dict[str, Any] = {"heard": heard}
        told["mode"] = path.stat().st_mode & 0o777
        told["answers"] = asyncio.run(_ask_and_end(path, process))
        told["log"] = [json.loads(line) for line in process.communicate(timeout=LIMIT)[1].splitlines()]
        told["code"] = process.returncode
        assert wait_for(lambda: "STOPPING=1" in heard)
        told["left"] = path.exists()
    return told


def _hear(socket_: socket.socket, heard: list[str]) -> None:
    """As systemd does, at once."""
    with contextlib.suppress(OSError):  # closed
        while True:
            heard.append(socket_.recv(100).decode())


class TestCommand:
    """``avl-edge serve`` in a process of its own."""

    def test_it_ends_in_order(self, told: dict[str, Any]) -> None:
        assert told["code"] == 0
        assert not told["left"], "the socket's file is there still"

    def test_answers_that_are_on_their_way_are_completed(self, told: dict[str, Any]) -> None:
        assert [len(each) > 0 for each in told["answers"]] == [True] * 16

    def test_systemd_hears_of_it(self, told: dict[str, Any]) -> None:
        assert told["heard"][0] in ("READY=1\nSTATUS=answering", "WATCHDOG=1")
        assert {"READY=1\nSTATUS=answering", "WATCHDOG=1", "STOPPING=1"} <= set(told["heard"])

    def test_its_socket_is_its_user_s(self, told: dict[str, Any]) -> None:
        assert told["mode"] == 0o660

    def test_its_log_is_lines_of_json_without_what_was_said(self, told: dict[str, Any]) -> None:
        requests = [each for each in told["log"] if each["message"] == "request" and each["status"] == 200]
        assert {each["finish_reason"] for each in requests if each["method"] == "POST"} == {"length"}
        assert all(each["request_id"] for each in requests)
        assert QUESTION not in json.dumps(told["log"])


async def _ask_and_end(path: Path, process: subprocess.Popen[str]) -> list[str]:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, timeout=LIMIT) as web:
        while (await web.get("http://localhost/health/ready")).status_code != 200:
            await asyncio.sleep(0.05)
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=web, max_retries=0)
        body: Any = asking(QUESTION, PICTURE, stream=True)
        body["max_tokens"] = 60
        streams = await asyncio.gather(*(client.chat.completions.create(**body) for _ in range(16)))
        process.send_signal(signal.SIGTERM)

        async def text(stream: Any) -> str:
            return "".join([each.choices[0].delta.content or "" async for each in stream])

        return await asyncio.gather(*map(text, streams))


class TestRefusals:
    """What cannot be begun is one line and an exit code."""

    def test_other_machines_need_a_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_app(["serve", "--host", "0.0.0.0"]) == 2
        assert "give --api-key-file" in capsys.readouterr().err

    def test_a_file_of_keys_has_to_have_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "keys").write_text("\n# none\n")
        for name in ("keys", "missing"):
            assert run_app(["serve", "--api-key-file", str(tmp_path / name)]) == 2
            assert "avl-edge: the file of API keys" in capsys.readouterr().err

    def test_a_model_has_to_be_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_app(["serve", "--model", "nowhere"]) == 2
        assert "there is no model" in capsys.readouterr().err

    def test_two_services_take_two_ports(self) -> None:
        with Address(port=0).listen() as first, pytest.raises(BadInput, match="another --port"):
            Address(port=first.getsockname()[1]).listen()

    def test_two_services_take_two_sockets(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with Address(path=path).listen(), pytest.raises(BadInput, match="another service listens"):
            Address(path=path).listen()
        Address(path=path).listen().close()  # what is left of one that was killed is in nobody's way
        path.unlink()
        path.write_text("a file")
        with pytest.raises(BadInput, match="no socket"):
            Address(path=path).listen()
        assert path.read_text() == "a file"


class TestStart:
    def test_it_says_that_it_loads(self, checkpoint: Checkpoints) -> None:
        runtime, go = Runtime.open(checkpoint("mistral-gqa")), threading.Event()

        def load() -> None:
            assert go.wait(LIMIT)
            runtime.load_weights()

        with _running(runtime, load) as served:
            assert served.request("GET", "/health")[0] == 200
            assert served.request("GET", "/v1/models")[0] == 200
            for status, headers, document in (served.request("GET", "/health/ready"), served.post(asking(QUESTION))):
                assert (status, document["error"]["code"], headers["retry-after"]) == (503, "loading", "1")
            assert served.request("GET", "/metrics")[0] == 200
            go.set()
            assert wait_for(lambda: served.request("GET", "/health/ready")[0] == 200)
            assert served.client(max_retries=3).models.list().data

    def test_what_keeps_it_from_loading_ends_it(self, checkpoint: Checkpoints) -> None:
        def load() -> None:
            raise BadModel("the weights are broken")

        service = Service(Runtime.open(checkpoint("mistral-gqa")), Settings(names=("test",)))
        with pytest.raises(BadModel, match="the weights are broken"):
            asyncio.run(Process(service, Keys(None), load).run(Address(port=0).listen()))


class TestEnd:
    def test_what_takes_too_long_is_cut(self, checkpoint: Checkpoints) -> None:
        """A client that would keep the service from ending is left."""
        settings = Settings(names=("test",), drain=1)
        with (
            serving(checkpoint("mistral-gqa"), settings) as served,
            stopped(served.runtime) as stop,
            served.connect() as connection,
        ):
            connection.sendall(raw_post(asking(QUESTION, PICTURE, stream=True)))
            assert stop.reached.wait(LIMIT)
            served.process.stop()
            assert wait_for(lambda: served.service.on_their_way == 0, 8)

    def test_who_asks_meanwhile_is_told(self, checkpoint: Checkpoints) -> None:
        with serving(checkpoint("mistral-gqa")) as served, served.connect() as open_before:
            open_before.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b" 200 " in open_before.recv(1000)
            with stopped(served.runtime) as stop, served.connect() as connection:
                connection.sendall(raw_post(asking(QUESTION, PICTURE, stream=True)))
                assert stop.reached.wait(LIMIT)
                served.service.state = "draining"
                status, headers, document = served.post(asking(QUESTION))
                assert (status, document["error"]["code"]) == (503, "draining")
                assert headers["retry-after"] == "1"
                assert served.request("GET", "/health/ready")[0] == 503
                assert served.request("GET", "/health")[0] == 200


def test_a_full_disk_for_the_log_ends_nothing(served: Served) -> None:
    with Path("/dev/full").open("w") as full:
        handler = logging.StreamHandler(full)
        handler.setFormatter(JsonLines())
        log = logging.getLogger("avl_edge.server")
        log.addHandler(handler)
        before, logging.raiseExceptions = logging.raiseExceptions, False
        try:
            assert served.post(asking(QUESTION))[0] == 200
        finally:
            log.removeHandler(handler)
            logging.raiseExceptions = before
            handler.stream = sys.stderr


def test_a_clock_that_jumps_moves_no_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + 86_400 * (-1) ** next(jumps))
    for _ in range(3):
        assert served.post(asking(QUESTION, avl_edge={"deadline_ms": 30_000}))[0] == 200


@contextmanager
def _running(runtime: Runtime, load: Any) -> Iterator[Served]:
    service = Service(runtime, Settings(names=("test",)))
    process, listener = Process(service, Keys(None), load), Address(port=0).listen()
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(process.run(listener)), daemon=True)
    thread.start()
    try:
        yield Served(service, process, port)
    finally:
        process.stop()
        thread.join(LIMIT)
    assert not thread.is_alive()
