"""What a family of models says about pictures in a prompt: pixels, placeholders, positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...config import Picture
from ...request import RopePositions
from ..pictures import PictureRule
from ..spec import ModelSpec


class ImageCodec(ABC):
    """How a picture becomes pixels, and stands in the prompt."""

    image_token: ClassVar[str] = "<image>"
    """The placeholder, where no file of a checkpoint says it."""
    chat_template: ClassVar[str | None] = None
    """For a checkpoint that brings none; None: as LLaVA was trained."""

    transparency: ClassVar[str] = "drop"
    """What its reference does with the transparent parts of a picture (:data:`~avl_edge.config.TRANSPARENCY`)."""

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


def open_codec(spec: ModelSpec, directory: Path) -> ImageCodec:
    """That of a model's family, by the settings in a checkpoint's directory; :class:`BadModel` for files that are
    missing, broken or do not fit the model."""
    codec: ImageCodec = import_module(spec.codec).open_codec(spec, directory)
    return codec
