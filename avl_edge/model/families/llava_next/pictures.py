"""Pictures of LLaVA-1.6: a square overview, and the picture in tiles whose padding is cut off again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import BadModel
from ....request import Picture
from ...images.config import CLIP, ImageProcessorConfig
from ...images.preprocess import on_white, preprocess
from ...pictures import Fixed, ImageCodec


@dataclass(frozen=True)
class AnyRes:
    """``crop``: edge in pixels of a tile; ``side``: patches along it; ``grids``: (rows, columns) that tiles may have.

    A picture's rows and columns are patches of its tiles together, without those that hold nothing but padding; a
    newline ends each row.
    """

    crop: int = 336
    side: int = 24
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

    def __call__(self, width: int, height: int) -> Picture:
        grid = self.grid(width, height)
        high, wide = grid[0] * self.side, grid[1] * self.side
        if width * high > wide * height:  # wider than the grid: rows of padding above and below
            content = int(round(height * (wide / width), 7))
            high -= (high - content) // 2 * 2
        else:
            content = int(round(width * (high / height), 7))
            wide -= (wide - content) // 2 * 2
        tile = Fixed.clip(self.side**2)
        tokens = tile.tokens + high * wide + high
        return Picture(1 + grid[0] * grid[1], tile.patches, tokens, high, wide, grid)

    def heaviest(self, tokens: int) -> list[Picture]:
        """None has fewer tokens than its overview."""
        tile = Fixed.clip(self.side**2)
        crops = 1 + max(rows * columns for rows, columns in self.grids)
        return [Picture(crops, tile.patches, tile.tokens)] * (tokens // tile.tokens)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The tiles that keep most of the picture's pixels, and waste the fewest of their own."""

        def keeps(grid: tuple[int, int]) -> tuple[int, int]:
            high, wide = grid[0] * self.crop, grid[1] * self.crop
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, -(wide * high - kept)

        return max(self.grids, key=keeps)


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
        rgb, side = on_white(image) if self.config.convert_rgb else image.convert("RGB"), self.rule.crop
        canvas = self._fitted(rgb, picture.tiles)
        rows, columns = picture.tiles
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        return np.stack([preprocess(each, self.config, max_pixels) for each in (rgb, *tiles)])

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
