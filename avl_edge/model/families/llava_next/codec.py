"""Pictures of LLaVA-1.6 as pixels: a square overview, and tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....config import Picture
from ....errors import BadModel
from ...images.config import CLIP, ImageProcessorConfig
from ...images.preprocess import preprocess
from ...prompt.codec import ImageCodec
from .pictures import AnyRes
from .spec import LlavaNextSpec


@dataclass(frozen=True)
class TileCodec(ImageCodec):
    """``pixels`` are ``[1 + tiles, 3, crop, crop]``, the overview first, then the tiles row by row."""

    rule: AnyRes
    config: ImageProcessorConfig

    @classmethod
    def open(cls, directory: Path, rule: AnyRes) -> TileCodec:
        """By the image processor's settings in ``directory``."""
        config = ImageProcessorConfig.open(directory, {"LlavaNextImageProcessor": CLIP})
        side = rule.crop
        edges = {config.crop or (side, side), (config.resize,) * 2 if isinstance(config.resize, int) else config.resize}
        if edges != {(side, side)}:
            raise BadModel(
                f"{directory}: size and crop_size of the image processor must be those of the vision tower, {side} x "
                f"{side} pixels"
            )
        return cls(rule, replace(config, resize=(side, side), crop=None))

    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        side = self.rule.crop
        canvas = self._fitted(image, picture.tiles)
        rows, columns = picture.tiles
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        return np.stack([preprocess(each, self.config, max_pixels) for each in (image, *tiles)])

    def _fitted(self, image: Image.Image, tiles: tuple[int, int]) -> Image.Image:
        """The whole picture in the middle of a black canvas of so many rows and columns of tiles."""
        height, width = (count * self.rule.crop for count in tiles)
        across, down = width / image.width, height / image.height
        if across < down:
            size = width, min(math.ceil(image.height * across), height)
        else:
            size = min(math.ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))
        resized = image.resize(size, self.config.resample)
        canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
        return canvas


def open_codec(spec: LlavaNextSpec, directory: Path) -> TileCodec:
    """By the settings in ``directory``."""
    return TileCodec.open(directory, spec.picture)
