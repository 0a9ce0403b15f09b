"""Where pictures and questions come from: the command line, files, standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..config import format_size
from ..errors import BadInput, reason
from ..files import read_bytes
from ..model.images import ImageSource, read_stream

STDIN = "-"
QUESTION_BYTES = 2**24
"""Of a file: more than any model's context holds."""


def check_stdin(images: Sequence[str], prompts: Sequence[str]) -> None:
    """:class:`BadInput` where standard input is named more than once."""
    if (*images, *prompts).count(STDIN) > 1:
        raise BadInput("only one --image or --prompt can be read from stdin: give the others as files")


def pictures(names: Sequence[str], max_pixels: int) -> list[ImageSource]:
    """Each a file's path, or - for standard input, which is read."""
    return [read_stream(sys.stdin.buffer, max_pixels) if name == STDIN else picture(name) for name in names]


def picture(name: str) -> Path:
    """The path of a picture's file; :class:`BadInput` for an address."""
    if not name:
        raise BadInput("the path of the picture is empty: give the path of a JPEG, PNG, WebP or BMP file")
    if re.match(r"(https?|ftp|data):", name):
        raise BadInput(f"'{name[:80]}' is an address, not a file: download the picture and give its path")
    return Path(name)


def questions(texts: Sequence[str]) -> list[str]:
    """Each as it is, or that of standard input for -, or of a file for @FILE; without the line break at its end. A
    question that begins with @ is written with two of them."""
    return [_question(text) for text in texts]


def _question(text: str) -> str:
    if text == STDIN:
        return _text_of(sys.stdin.buffer, "standard input")
    if not text.startswith("@"):
        return text
    if text.startswith("@@"):
        return text[1:]
    path = Path(text[1:])
    try:
        with path.open("rb") as file:
            return _text_of(file, f"{str(path)!r}")
    except OSError as error:
        raise BadInput(
            f"the question's file {str(path)!r} cannot be read ({reason(error)}): give --prompt @FILE the path of a "
            f"text, or begin a question with @@ to ask it as it is"
        ) from None


def _text_of(file: BinaryIO, name: str) -> str:
    content = read_bytes(file, QUESTION_BYTES)
    if content is None:
        raise BadInput(f"{name} is too long for a question: more than {format_size(QUESTION_BYTES)}")
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise BadInput(f"{name} is no text in UTF-8: convert it first") from None
