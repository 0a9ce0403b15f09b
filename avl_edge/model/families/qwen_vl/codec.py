"""Pictures of Qwen-VL as pixels and as text, and its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer

from ....config import Picture
from ...images.config import ImageProcessorConfig
from ...prompt.tiktoken_file import read_tiktoken
from ..llava.codec import SquareCodec
from .spec import QwenVlSpec

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""In the order of their ids, which follow those of the file."""
_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' }}You are a helpful assistant."
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% set shown = namespace(count=0) %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set shown.count = shown.count + 1 %}"
    "{{ 'Picture ' }}{{ shown.count }}{{ ': <img><imgpad></img>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class QwenVlCodec(SquareCodec):
    """``pixels`` are ``[3, edge, edge]``."""

    image_token: ClassVar[str] = "<imgpad>"
    chat_template: ClassVar[str] = _CHAT_TEMPLATE
    end_tokens: ClassVar[tuple[str, ...]] = ("<|im_end|>", "<|endoftext|>")

    def placeholder(self, picture: Picture, image_token: str) -> str:
        return image_token * picture.tokens

    def tokenizer(self, directory: Path) -> Tokenizer | None:
        return read_tiktoken(directory, "qwen.tiktoken", _PATTERN, _SPECIAL)


def open_codec(spec: QwenVlSpec, directory: Path) -> QwenVlCodec:  # noqa: ARG001
    """No file says more than the config does."""
    edge = spec.image_size
    return QwenVlCodec(spec.picture, ImageProcessorConfig(resize=(edge, edge), crop=None))
