"""Pictures of LLaVA-1.5: each is made one square of the vision tower's size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....config import Picture
from ....errors import BadModel
from ...images.config import ImageProcessorConfig
from ...images.preprocess import preprocess
from ...pictures import Fixed
from ...prompt.codec import ImageCodec
from .spec import LlavaSpec


@dataclass(frozen=True)
class SquareCodec(ImageCodec):
    """``pixels`` are ``[3, height, width]``."""

    rule: Fixed
    config: ImageProcessorConfig

    @classmethod
    def open(cls, directory: Path, rule: Fixed, image_size: int | None) -> SquareCodec:
        """By the image processor's settings in ``directory``. ``image_size``: the edge in pixels of the square that the
        vision tower takes (None: not checked)."""
        if rule.tokens < 1:
            raise BadModel(f"{directory}: an image must have at least 1 token, not {rule.tokens}")
        config = ImageProcessorConfig.open(directory)
        size = config.output_size
        if size is None:
            raise BadModel(f"{directory}: the image processor gives every picture another size; set crop_size or size")
        if image_size is not None and size != (image_size, image_size):
            raise BadModel(
                f"{directory}: the image processor makes pictures of {size[0]} x {size[1]} pixels (height x width), "
                f"but the vision tower takes {image_size} x {image_size}"
            )
        return cls(rule, config)

    @property
    def fixed(self) -> Picture:
        return self.rule(0, 0)

    def pixels(
        self,
        image: Image.Image,
        picture: Picture,  # noqa: ARG002
        max_pixels: int,
    ) -> npt.NDArray[np.float32]:
        return preprocess(image, self.config, max_pixels)


def open_codec(spec: LlavaSpec, directory: Path) -> SquareCodec:
    """By the settings in ``directory``."""
    return SquareCodec.open(directory, spec.picture, spec.vision.image_size)
