"""Pictures of InternVL: stretched to as many tiles as come closest to their shape, and a thumbnail beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import BadModel, quoted
from ....request import Picture
from ...images.config import CLIP, ImageProcessorConfig, find_image_settings, read_image_settings
from ...images.preprocess import on_white, preprocess
from ...pictures import ImageCodec

MOST_TILES = 12
"""Of a picture, where the settings do not say."""
_LARGEST_GRID = 256
_DEFAULTS = dict(CLIP) | {"size": {"height": 384, "width": 384}, "do_center_crop": False}
_KINDS = {"GotOcr2ImageProcessor": _DEFAULTS}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiled:
    """``side``: edge of a tile in pixels; ``patches`` of a tile in the tower and ``tokens`` that it becomes; from
    ``least`` to ``most`` tiles."""

    side: int
    patches: int
    tokens: int
    least: int = 1
    most: int = MOST_TILES

    def __call__(self, width: int, height: int) -> Picture:
        rows, columns = self.grid(width, height)
        crops = rows * columns + (rows * columns > 1)
        return Picture(crops, self.patches, crops * self.tokens, tiles=(rows, columns))

    def heaviest(self, tokens: int) -> list[Picture]:
        return [Picture(1, self.patches, self.tokens)] * (tokens // self.tokens)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The (rows, columns) of tiles whose shape comes closest; of equal ones the most that the picture fills to more
        than half."""
        if self.most == 1:
            return 1, 1
        numbers = range(1, self.most + 1)
        found = [(w, h) for w in numbers for h in numbers if self.least <= w * h <= self.most]
        best, least = (1, 1), float("inf")
        for wide, high in sorted(found, key=lambda grid: grid[0] * grid[1]):
            off = abs(width / height - wide / high)
            if off < least or (off == least and width * height > 0.5 * self.side**2 * wide * high):
                best, least = (wide, high), off
        return best[1], best[0]


def read_tile_counts(directory: Path) -> tuple[int, int]:
    """The fewest and the most tiles of a picture by the image processor's settings."""
    settings, where = find_image_settings(directory)
    given = settings if isinstance(settings, Mapping) else {}
    counts = given.get("min_patches", 1), given.get("max_patches", MOST_TILES)
    if any(type(each) is not int for each in counts) or not 1 <= counts[0] <= counts[1] <= _LARGEST_GRID:
        raise BadModel(f"{where}: min_patches and max_patches must be numbers of tiles, not {quoted(list(counts))}")
    return counts


@dataclass(frozen=True)
class TileCodec(ImageCodec):
    """``pixels`` are ``[tiles, 3, side, side]``, row by row, the thumbnail last."""

    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    chat_template: ClassVar[str] = _CHAT_TEMPLATE

    rule: Tiled
    config: ImageProcessorConfig

    @classmethod
    def open(cls, directory: Path, rule: Tiled) -> TileCodec:
        """By the image processor's settings in ``directory``."""
        settings, where = read_image_settings(directory)
        config = ImageProcessorConfig.parse(settings, where, _KINDS)
        if config.resize != (rule.side, rule.side) or config.crop is not None:
            raise BadModel(f"{where}: size must be that of the vision tower, {rule.side} x {rule.side} pixels")
        return cls(rule, config)

    def placeholder(self, picture: Picture, image_token: str) -> str:
        return f"<img>{image_token * picture.tokens}</img>"

    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        rgb, side = on_white(image) if self.config.convert_rgb else image.convert("RGB"), self.rule.side
        rows, columns = picture.tiles
        whole = preprocess(rgb, replace(self.config, resize=(rows * side, columns * side)), max_pixels)
        tiles = whole.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        return tiles if len(tiles) == 1 else np.concatenate([tiles, preprocess(rgb, self.config, max_pixels)[None]])
