"""Cameras: of each the latest frame alone, for requests that name the camera instead of sending a picture."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from ..config import require
from ..model.images import read_stream
from ..optional import optional
from .pictures import SentPicture
from .refusals import Refusal

_log = logging.getLogger("avl_edge.server")
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_AGAIN = 1.0
"""Seconds after which a camera that failed is opened again."""
_OPTIONS = {"rtsp_transport": "tcp", "timeout": "5000000"}


@dataclass(frozen=True)
class Frame:
    """The file of a frame, and how old it is, in seconds."""

    content: bytes
    age: float


class Camera(Protocol):
    """Where frames come from."""

    def latest(self) -> Frame | None:
        """The newest frame; None where there is none."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


class Folder:
    """Pictures that another program writes into a folder, each whole at once (by renaming): the newest one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def latest(self) -> Frame | None:
        try:
            with os.scandir(self._path) as entries:
                files = [each for each in entries if Path(each.name).suffix.lower() in _SUFFIXES and each.is_file()]
            newest = max(files, key=lambda each: each.stat().st_mtime_ns, default=None)
            if newest is None:
                return None
            with open(newest.path, "rb") as file:
                content = read_stream(file)
                return Frame(content, max(time.time() - os.fstat(file.fileno()).st_mtime, 0.0))
        except OSError:  # it was taken away meanwhile
            return None

    def close(self) -> None:
        pass


class Stream:
    """A V4L2 device, an RTSP address or a video's file, read by a thread of its own with PyAV. A file is played as fast
    as it was taken, again and again. What cannot be read now is opened again, every second."""

    def __init__(self, name: str, address: str) -> None:
        self._library: Any = optional("av", f"the camera {name}", "camera")
        self._name, self._address = name, address
        self._newest: tuple[Any, float] | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"avl-edge camera {name}", daemon=True)
        self._thread.start()

    def latest(self) -> Frame | None:
        newest = self._newest
        if newest is None:
            return None
        frame, when = newest
        file = BytesIO()
        frame.to_image().save(file, "BMP")
        return Frame(file.getvalue(), time.monotonic() - when)

    def close(self) -> None:
        self._ends.set()
        self._thread.join(2 * _AGAIN)

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._read()
            except Exception as error:
                self._newest = None
                kind = type(error).__name__
                _log.warning("a camera cannot be read", extra={"fields": {"camera": self._name, "error": kind}})
                self._ends.wait(_AGAIN)

    def _read(self) -> None:
        is_device, is_file = self._address.startswith("/dev/"), Path(self._address).is_file()
        options = _OPTIONS if self._address.startswith("rtsp") else {}
        form = "v4l2" if is_device else None
        with self._library.open(self._address, format=form, options=options, timeout=5.0) as container:
            began, first = time.monotonic(), None
            for frame in container.decode(video=0):
                if self._ends.is_set():
                    return
                if is_file and frame.time is not None:
                    first = frame.time if first is None else first
                    self._ends.wait(max(frame.time - first - (time.monotonic() - began), 0.0))
                self._newest = (frame, time.monotonic())


class Cameras:
    """The cameras of a service by name, from ``NAME=ADDRESS`` each: :class:`BadInput` for what is none."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._cameras: dict[str, Camera] = {}
        try:
            for name, address in sources.items():
                self._cameras[name] = _opened(name, address)
        except BaseException:
            self.close()
            raise

    def picture(self, name: str, max_age: float | None, param: str) -> SentPicture:
        """The latest frame, at most ``max_age`` seconds old; :class:`Refusal`, naming ``param``."""
        camera = self._cameras.get(name)
        if camera is None:
            known = ", ".join(self._cameras) or "none"
            raise Refusal(400, f"there is no camera {name!r} here: {known}", param=param, code="unknown_camera")
        frame = camera.latest()
        if frame is None:
            raise Refusal(503, f"the camera {name!r} gives no frames now", param=param, code="no_frame", retry_after=1)
        if max_age is not None and frame.age > max_age:
            said = f"the latest frame of the camera {name!r} is {frame.age:.2f} s old"
            raise Refusal(503, said, param=param, code="frame_too_old", retry_after=1)
        return SentPicture(frame.content, hashlib.sha256(frame.content).hexdigest(), is_passing=True)

    def close(self) -> None:
        """Let go of all of them."""
        for each in self._cameras.values():
            each.close()


def _opened(name: str, address: str) -> Camera:
    if Path(address).is_dir():
        return Folder(Path(address))
    is_stream = address.startswith(("rtsp://", "rtsps://")) or Path(address).exists()
    require(is_stream, f"the camera {name} is no device, file, folder or rtsp:// address: {address!r}")
    return Stream(name, address)


def camera_sources(texts: list[str] | None) -> dict[str, str]:
    """Of ``--camera NAME=ADDRESS``, by name; :class:`BadInput`."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, address = text.partition("=")
        require(bool(name and equals and address), f"cannot read {text!r} as a camera: give NAME=ADDRESS")
        require(name not in found, f"the camera {name!r} is given twice: keep one of them")
        found[name] = address
    return found
