"""From a picture to patches and tokens: what a family of models says about its pictures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import require
from ..request import Picture, RopePositions


class PictureRule(Protocol):
    """How a family of models cuts a picture."""

    def __call__(self, width: int, height: int) -> Picture: ...


class ImageCodec(ABC):
    """How a picture becomes pixels, and stands in the prompt."""

    rule: PictureRule

    @property
    def fixed(self) -> Picture | None:
        """What every picture becomes, where its size does not matter; None where it does."""
        return None

    def placeholder(self, picture: Picture, image_token: str) -> str:
        """The text in which a picture's tokens stand in the prompt, in place of the template's ``image_token``."""
        return image_token * picture.tokens

    @abstractmethod
    def pixels(self, image: Image.Image, picture: Picture) -> npt.NDArray[np.float32]:
        """What the vision encoder takes, of an upright RGB ``image``; ``picture`` is the ``rule``'s for its size."""

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


@dataclass(frozen=True)
class Merged:
    """Qwen2-VL and later: the picture keeps its shape, in multiples of two patches, within a range of pixels."""

    patch: int
    min_pixels: int
    max_pixels: int

    def __call__(self, width: int, height: int) -> Picture:
        require(max(width, height) <= 200 * min(width, height), "a picture may be at most 200 times as long as wide")
        edge = 2 * self.patch
        wide, high = (max(edge, round(length / edge) * edge) for length in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(edge, math.floor(length / shrink / edge) * edge) for length in (width, height))
        elif wide * high < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(length * stretch / edge) * edge for length in (width, height))
        tokens = (wide // edge) * (high // edge)
        return Picture(1, 4 * tokens, tokens)
