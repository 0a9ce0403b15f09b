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
from tokenizers import Tokenizer

from ...config import Picture
from ...errors import BadInput
from ...request import RopePositions
from ..images.frames import Moment
from ..pictures import PictureRule
from ..spec import ModelSpec

_NO_VIDEOS = "this model takes no videos: give it pictures"


class ImageCodec(ABC):
    """How a picture becomes pixels, and stands in the prompt."""

    image_token: ClassVar[str] = "<image>"
    """The placeholder, where no file of a checkpoint says it."""
    chat_template: ClassVar[str | None] = None
    """For a checkpoint that brings none; None: as LLaVA was trained."""

    transparency: ClassVar[str] = "drop"
    """What its reference does with the transparent parts of a picture (:data:`~avl_edge.config.TRANSPARENCY`)."""

    end_tokens: ClassVar[tuple[str, ...]] = ()
    """That end an answer beside those that a checkpoint's files name."""

    rule: PictureRule

    def tokenizer(self, directory: Path) -> Tokenizer | None:  # noqa: ARG002
        """That of a checkpoint without a tokenizer.json, where the family has another file."""
        return None

    @property
    def fixed(self) -> Picture | None:
        """What every picture becomes, where its size does not matter; None where it does."""
        return None

    def within(self, min_pixels: int | None, max_pixels: int | None) -> ImageCodec:  # noqa: ARG002
        """The same for pictures that are resized to this range of pixels; None: as it is. BadInput where the family or
        the checkpoint says what size pictures have."""
        raise BadInput("this model gives pictures sizes of its own: leave min_pixels and max_pixels out")

    def placeholder(self, picture: Picture, image_token: str) -> str:
        """The text in which a picture's tokens stand in the prompt, in place of the template's ``image_token``."""
        return image_token * picture.tokens

    @abstractmethod
    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        """What the vision encoder takes, of an upright RGB ``image``; ``picture`` is the ``rule``'s for its size.

        BadImage where there would be more than twice ``max_pixels`` on the way.
        """

    @property
    def video_token(self) -> str | None:
        """The placeholder of a video in a template; None where the family takes none."""
        return None

    def measure_moment(self, width: int, height: int, moment: Moment) -> Picture:  # noqa: ARG002
        """What two frames of a video become. BadInput where the family takes no videos."""
        raise BadInput(_NO_VIDEOS)

    def video_placeholder(self, moments: Sequence[Picture]) -> str:  # noqa: ARG002
        """The text in which a video's tokens stand in the prompt, in place of the template's ``video_token``."""
        raise BadInput(_NO_VIDEOS)

    def moment_pixels(
        self,
        frames: tuple[Image.Image, Image.Image],  # noqa: ARG002
        picture: Picture,  # noqa: ARG002
        max_pixels: int,  # noqa: ARG002
    ) -> npt.NDArray[np.float32]:
        """:meth:`pixels` of two frames of a video."""
        raise BadInput(_NO_VIDEOS)

    def rope(self, length: int, places: Sequence[tuple[int, Picture]]) -> RopePositions | None:  # noqa: ARG002
        """The positions of a prompt of ``length`` tokens with pictures, each with the place of its first token; None
        where every token's position is its place."""
        return None


def open_codec(spec: ModelSpec, directory: Path) -> ImageCodec:
    """That of a model's family, by the settings in a checkpoint's directory; :class:`BadModel` for files that are
    missing, broken or do not fit the model."""
    codec: ImageCodec = import_module(spec.codec).open_codec(spec, directory)
    return codec
