"""Files of other people's making, read within bounds: bytes, text, JSON; and what a file is that is not what its name
says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from .config import format_size
from .errors import BadModel, refusing

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of a large one."""
FETCH_LFS = "run 'git lfs pull'"
MODEL_FILE_BYTES = 8 * 2**20
"""The most that one of a model's JSON files may have: published ones have a hundredth of it. A tokenizer's may have
:data:`TOKENIZER_BYTES`."""
TOKENIZER_BYTES = 64 * 2**20


def read_bytes(file: BinaryIO, most: int) -> bytes | None:
    """All of a stream, or None if it has more than ``most`` bytes; no more than that is read."""
    chunks, left = [], most
    while chunk := file.read(min(left + 1, 1 << 20)):
        left -= len(chunk)
        if left < 0:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def read_text(path: Path, most: int = MODEL_FILE_BYTES) -> str | None:
    """The text of a model's file, or None if there is no such file; :class:`BadModel` if it is not readable UTF-8 or
    has more than ``most`` bytes."""
    try:
        with path.open("rb") as file:
            content = read_bytes(file, most)
        if content is None:
            raise BadModel(f"{path} has more than {format_size(most)}: no such file of a model is so large")
        if content.startswith(LFS_POINTER):
            raise lfs_pointer(path)
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()  # line ends become \n
    except FileNotFoundError:
        return None
    except PermissionError:
        raise BadModel(f"{path} may not be read by this user: chmod a+r it, or run as its owner") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadModel(f"{path} cannot be read ({reason}): copy the checkpoint again") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a model's file, or None if there is no such file; :class:`BadModel` for anything else."""
    text = read_text(path)
    if text is None:
        return None
    with refusing(lambda reason: BadModel(f"{path} is not valid JSON ({reason}): copy the checkpoint again")):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise BadModel(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS left in place of a large one; False for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):
        return False


def lfs_pointer(path: Path) -> BadModel:
    """The error for a file of a model that is one."""
    return BadModel(f"{path} is a pointer of Git LFS in place of the file: {FETCH_LFS} in its folder, or download it")
