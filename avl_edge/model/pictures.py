"""From a picture to patches and tokens: what a family of models says about its pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..request import Picture, RopePositions


class PictureRule(Protocol):
    """How a family of models cuts a picture."""

    def __call__(self, width: int, height: int) -> Picture: ...

    def heaviest(self, tokens: int) -> list[Picture]:
        """Pictures that have up to so many tokens together, and for that many the vision encoder most to do."""
        ...


class ImageCodec(ABC):
    """How a picture becomes pixels, and stands in the prompt."""

    image_token: ClassVar[str] = "<image>"
    """The placeholder, where no file of a checkpoint says it."""
    chat_template: ClassVar[str | None] = None
    """For a checkpoint that brings none; None: as LLaVA was trained."""

    rule: PictureRule

    @property
    def fixed(self) -> Picture | None:
        """What every picture becomes, where its size does not matter; None where it does."""
        return None

    def placeholder(self, picture: Picture, image_token: str) -> str:
        """The text in which a picture's tokens stand in the prompt, in place of the template's ``image_token``."""
        return image_token * picture.tokens

    @abstractmethod
    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        """What the vision encoder takes, of an upright RGB ``image``; ``picture`` is the ``rule``'s for its size.

        BadImage where there would be more than twice ``max_pixels`` on the way.
        """

    def rope(self, length: int, places: Sequence[tuple[int, Picture]]) -> RopePositions | None:  # noqa: ARG002
        """The positions of a prompt of ``length`` tokens with pictures, each with the place of its first token; None
        where every token's position is its place."""
        return None


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
