"""Pictures of InternVL as pixels, tile by tile, and as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....config import Picture
from ....errors import BadModel
from ...image_settings import read_image_settings
from ...images.config import CLIP, ImageProcessorConfig
from ...images.preprocess import preprocess
from ...prompt.codec import ImageCodec
from .pictures import Tiled
from .spec import InternVlSpec

_DEFAULTS = dict(CLIP) | {"size": {"height": 384, "width": 384}, "do_center_crop": False}
_KINDS = {"GotOcr2ImageProcessor": _DEFAULTS}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
        side = self.rule.side
        rows, columns = picture.tiles
        whole = preprocess(image, replace(self.config, resize=(rows * side, columns * side)), max_pixels)
        tiles = whole.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        return tiles if len(tiles) == 1 else np.concatenate([tiles, preprocess(image, self.config, max_pixels)[None]])


def open_codec(spec: InternVlSpec, directory: Path) -> TileCodec:
    """By the settings in ``directory``."""
    return TileCodec.open(directory, spec.picture)
