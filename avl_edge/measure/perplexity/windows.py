"""Texts cut into windows of tokens: a prompt, and what is predicted after it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import PromptShape, require
from ...errors import BadInput
from ...kv.cache import prompt_shape
from ...model.prompt.text_tokenizer import TextTokenizer
from ...request import ImageSpan, Prompt

TEXT = "text:"
HEADER = 16
"""Tokens of text before those that count as an image's, as a chat template writes them: attention sinks among them."""

_LARGEST = 64 << 20


@dataclass(frozen=True)
class WindowLayout:
    """A window is ``length`` tokens: a prompt of ``prompt``, and the rest, each predicted from all before it.

    With ``image`` so many of the prompt's tokens, after :data:`HEADER` others, count as an image's: their rows are
    image rows, their features their own embeddings. The model computes what it computes of the text.
    """

    length: int = 1024
    prompt: int = 128
    image: int = 0

    def __post_init__(self) -> None:
        require(
            1 <= self.prompt < self.length,
            f"a window of {self.length} tokens has no room for a prompt of {self.prompt} and a token after it",
        )
        require(
            self.image == 0 or HEADER + self.image < self.prompt,
            f"{self.image} image tokens do not fit into a prompt of {self.prompt}: the first {HEADER} and the last "
            "are text",
        )

    @property
    def predicted(self) -> int:
        """Tokens of a window that are predicted."""
        return self.length - self.prompt

    @property
    def spans(self) -> tuple[ImageSpan, ...]:
        return (ImageSpan("", HEADER, self.image),) if self.image else ()

    @property
    def shape(self) -> PromptShape:
        return prompt_shape(self.prompt, self.spans)


@dataclass(frozen=True)
class Window:
    """Tokens of the text ``name``, whose file has the SHA-256 ``digest``."""

    name: str
    digest: str
    token_ids: tuple[int, ...]

    def prompt(self, layout: WindowLayout) -> Prompt:
        return Prompt(self.token_ids[: layout.prompt], layout.spans, None)


def files_of(data: str) -> list[Path]:
    """The files that ``text:FILE,FILE`` names."""
    return [Path(name.strip()) for name in data.removeprefix(TEXT).split(",") if name.strip()]


def read_windows(files: Sequence[Path], tokenizer: TextTokenizer, layout: WindowLayout, count: int) -> list[Window]:
    """The first ``count`` windows of each of ``files``, UTF-8 text. Each begins with the tokens that the tokenizer puts
    before any text, if there are such.

    Raises :class:`BadInput` for a file that cannot be read, is no text, or is too short.
    """
    require(bool(files), f"there is no text: give --data {TEXT}FILE, or several with commas")
    begin = tokenizer.encode("")
    size = layout.length - len(begin)
    windows = []
    for file in files:
        content, text = _read(file)
        token = next(iter(tokenizer.reserved.count(text)), None)
        require(token is None, f"{file} contains {token}, which the model reserves for itself: give another text")
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        require(
            len(ids) >= count * size,
            f"{file} has {len(ids)} tokens, which are fewer than {count} x {size}: give a longer text, or a smaller "
            "--window",
        )
        digest = hashlib.sha256(content).hexdigest()
        windows += [Window(file.name, digest, (*begin, *ids[at * size : (at + 1) * size])) for at in range(count)]
    return windows


def _read(file: Path) -> tuple[bytes, str]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror})") from None
    require(len(content) <= _LARGEST, f"{file} is larger than {_LARGEST >> 20} MiB: give a part of it")
    require(bool(content.strip()), f"{file} is empty: give a text")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    require("\0" not in text, f"{file} is not UTF-8 text")
    return content, text
