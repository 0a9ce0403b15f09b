"""From the size of a picture to patches and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..config import Picture


class PictureRule(Protocol):
    """How a family of models cuts a picture."""

    def __call__(self, width: int, height: int) -> Picture: ...

    def heaviest(self, tokens: int) -> list[Picture]:
        """Pictures that have up to so many tokens together, and for that many the vision encoder most to do."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Every picture is made one square: LLaVA-1.5, Qwen-VL."""

    patches: int
    tokens: int

    @classmethod
    def clip(cls, patches: int, *, drop_class_token: bool = True) -> Fixed:
        """Of a CLIP tower over ``patches``: its class token runs along, and is dropped from the features or not."""
        return cls(patches + 1, patches + (not drop_class_token))

    def __call__(self, width: int, height: int) -> Picture:  # noqa: ARG002
        return Picture(1, self.patches, self.tokens)

    def heaviest(self, tokens: int) -> list[Picture]:
        return [self(0, 0)] * (tokens // self.tokens)
