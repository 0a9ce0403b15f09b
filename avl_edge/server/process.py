"""The service as a process: its socket, its signals, what it tells systemd, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from PIL import Image

from ..config import Options
from ..errors import AvlEdgeError, BadInput, reason
from .access import Keys
from .app import application
from .connections import Connections
from .frame import JsonLines
from .service import Service

_log = logging.getLogger("avl_edge.server")
_BACKLOG = 512


@dataclass(frozen=True)
class Address:
    """Where to listen: a UNIX ``path``, or ``host`` and ``port`` (0: any that is free)."""

    host: str = "127.0.0.1"
    port: int = 8000
    path: Path | None = None

    def listen(self) -> socket.socket:
        """A socket that listens there; :class:`BadInput` where another program does, or nobody may."""
        try:
            return self._of_path(self.path) if self.path else self._of_host()
        except OSError as error:
            raise BadInput(f"cannot listen at {self}: {reason(error)}; give another --port or --socket") from None

    def _of_host(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((self.host, self.port))
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
        return made

    def _of_path(self, path: Path) -> socket.socket:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise BadInput(f"{str(path)!r} is there and no socket: give --socket another path")
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other,
                contextlib.suppress(ConnectionRefusedError),
            ):
                other.connect(str(path))
                raise BadInput(f"another service listens at {str(path)!r}: give --socket another path")
            path.unlink()  # of one that did not end in order
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o117)  # for this user and its group
            try:
                made.bind(str(path))
            finally:
                os.umask(before)
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
        return made

    def __str__(self) -> str:
        return str(self.path) if self.path else f"{self.host}:{self.port}"


def log_json(level: int) -> None:
    """Log as lines of JSON on stderr. What cannot be written, on a full disk, is lost, and nothing else."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("avl_edge").setLevel(level)


class Notifier:
    """Tells systemd how the service is, where systemd asked for it (``Type=notify``)."""

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        self.every = int(microseconds) / 2e6 if microseconds.isdigit() and self._path else None
        """Seconds between two signs of life; None where nobody waits for any."""

    def __call__(self, state: str) -> None:
        if not self._path:
            return
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # nobody may be reading
            sender.connect(path)
            sender.send(state.encode())


class _Server(uvicorn.Server):
    """uvicorn's server with our signals: SIGTERM and SIGINT end it in order, a second one at once, SIGHUP reloads."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        super().__init__(config)
        self._handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number, handler in self._handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in self._handlers:
                loop.remove_signal_handler(number)


def serve(service: Service, keys: Keys, address: Address, load: Callable[[], None]) -> None:
    """Answer until a signal ends it: first 503 while ``load`` loads the model, then, once it is warm, requests.

    Raises what ``load`` raises, and :class:`BadInput` where nobody can listen at ``address``.
    """
    listener = address.listen()
    try:
        asyncio.run(Process(service, keys, load).run(listener))
    finally:
        if address.path:
            with contextlib.suppress(OSError):
                address.path.unlink()


class Process:
    """Answers of ``service`` to those who have one of ``keys``, once ``load`` has loaded its model."""

    def __init__(self, service: Service, keys: Keys, load: Callable[[], None]) -> None:
        self._service, self._keys, self._load = service, keys, load
        self._notify = Notifier()
        self._failure: BaseException | None = None
        self._server: _Server | None = None

    async def run(self, listener: socket.socket) -> None:
        """Answer until :meth:`stop`, or a signal where this is the main thread. Raises what ``load`` raises."""
        service, settings = self._service, self._service.settings
        connections = Connections(settings)
        config = uvicorn.Config(
            application(service, self._keys, lambda: connections.count),
            http=connections.protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(int(settings.header_timeout), 1),
            timeout_graceful_shutdown=max(int(settings.drain), 1),
        )
        server = self._server = _Server(config, self.stop, self.reload)
        name = listener.getsockname()
        where = name if isinstance(name, str) else f"http://{name[0]}:{name[1]}"
        _log.info("listening", extra={"fields": {"address": where, "model": settings.names[0]}})
        tasks = [asyncio.ensure_future(self._get_ready()), asyncio.ensure_future(self._watch())]
        try:
            await server.serve([listener])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            service.held.clear()
            await asyncio.get_running_loop().run_in_executor(None, service.runtime.close)
        _log.info("ended")
        if self._failure:
            raise self._failure

    async def _get_ready(self) -> None:
        try:
            await self._service.in_thread(self._load)
            await self._service.in_thread(partial(warm_up, self._service))
        except Exception as error:
            self._failure = error
            self.stop()
            return
        if self._service.state == "loading":
            self._service.state = "ready"
            self._notify("READY=1\nSTATUS=answering")
            _log.info("ready", extra={"fields": {"load_ms": round(self._service.runtime.load_ms, 1)}})

    async def _watch(self) -> None:
        """Signs of life for systemd, for as long as the engine gives some."""
        while self._notify.every is not None:
            await asyncio.sleep(self._notify.every)
            if self._service.state != "ready":
                self._notify("WATCHDOG=1")
                continue
            with contextlib.suppress(AvlEdgeError):
                await asyncio.get_running_loop().run_in_executor(None, self._service.runtime.engine.call, _nothing)
                self._notify("WATCHDOG=1")

    def stop(self) -> None:
        """Take no more requests and end with those on their way, within the time for it; called again, at once."""
        if self._server is not None:
            self._server.force_exit = self._server.should_exit
            self._server.should_exit = True
        self._service.state = "draining"
        self._notify("STOPPING=1")
        _log.info("ending", extra={"fields": {"on_their_way": self._service.on_their_way}})

    def reload(self) -> None:
        """Read the file of keys again. One that cannot be read changes nothing."""
        self._notify("RELOADING=1")
        try:
            self._keys.load()
            _log.info("reloaded")
        except BadInput as error:
            _log.error("not reloaded", extra={"fields": {"why": str(error)}})
        self._notify("READY=1")


def _nothing() -> None:
    """What the engine is asked to see whether it answers."""


def warm_up(service: Service) -> None:
    """Answer once, with a picture and without, so that the first client does not wait for what is only done once."""
    picture = Image.new("RGB", (336, 336), (128, 128, 128))
    for images in ([picture], []):
        service.runtime.generate(images, "What is it?", Options(max_new_tokens=2)).result()
