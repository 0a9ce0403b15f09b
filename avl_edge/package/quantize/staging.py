"""A folder that is filled beside its place and then renamed: whoever looks sees all of it, or nothing.

What an interrupted run left is gone on from by the next one that is about the same.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config import require
from ...errors import AvlEdgeError, Busy
from ..directory import flush

_ABOUT = "about.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotWritten(AvlEdgeError):
    """The files could not be written. What is complete of them is gone on from by the next run."""


def require_new(out: Path) -> None:
    """:class:`BadInput` unless ``out`` is a folder to be made, or an empty one."""
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"{out} is there already: give --out a folder that is new or empty",
    )


@contextmanager
def staged(out: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to fill, with what was complete of a run with the same ``about``; it becomes ``out`` at the end.

    :class:`Busy` where another process fills it, :class:`NotWritten` where the disk does not take the files. After any
    error it stays, hidden beside ``out``.
    """
    staging = out.absolute().parent / f".{out.name}.staging"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another process is writing {out}: wait for it, or give another --out") from None
            _go_on(staging, json.dumps(about, sort_keys=True))
            yield staging
            mode = (staging / _ABOUT).stat().st_mode
            (staging / _ABOUT).unlink()
            for path in staging.iterdir():
                path.chmod(mode)  # safetensors makes files that nobody else may read
                flush(path)
            flush(staging)
            require_new(out)
            staging.rename(out)
            flush(out.absolute().parent)
        finally:
            os.close(descriptor)
    except OSError as error:
        cure = "free some space and run it again" if error.errno in _NO_ROOM else "give another --out"
        raise NotWritten(f"{out} cannot be written ({error.strerror or error}): {cure}") from None


def _go_on(staging: Path, about: str) -> None:
    """Empty a folder that is about something else."""
    file = staging / _ABOUT
    if not file.is_file() or file.read_text(encoding="utf-8") != about:
        for path in staging.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file.write_text(about, encoding="utf-8")
