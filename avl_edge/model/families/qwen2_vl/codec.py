"""Pictures of the Qwens as pixels and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....config import Picture
from ....errors import BadModel, quoted
from ....request import RopePositions
from ...image_settings import read_image_settings
from ...images.config import CLIP, ImageProcessorConfig
from ...images.preprocess import preprocess
from ...prompt.codec import ImageCodec
from .pictures import FRAMES, Merged
from .spec import QwenSpec

_DEFAULTS = dict(CLIP) | {"do_center_crop": False, "patch_size": 14, "temporal_patch_size": FRAMES, "merge_size": 2}
_KINDS = {"Qwen2VLImageProcessor": _DEFAULTS}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PatchCodec(ImageCodec):
    """``pixels`` are ``[patches, 3 * FRAMES * patch * patch]``, in blocks of those that become one token."""

    image_token: ClassVar[str] = "<|image_pad|>"
    chat_template: ClassVar[str] = _CHAT_TEMPLATE
    transparency: ClassVar[str] = "white"

    rule: Merged
    config: ImageProcessorConfig

    @classmethod
    def open(cls, directory: Path, rule: Merged) -> PatchCodec:
        """By the image processor's settings in ``directory``."""
        settings, where = read_image_settings(directory)
        if not isinstance(settings, Mapping):
            raise BadModel(f"{where}: the image processor's settings must be a JSON object")
        expected = {"patch_size": rule.patch, "merge_size": rule.merge, "temporal_patch_size": FRAMES}
        for key, value in expected.items():
            if settings.get(key, _DEFAULTS[key]) != value:
                raise BadModel(f"{where}: {key} is {quoted(settings[key])}, but the model's is {value}")
        if settings.get("do_resize", True) is not True:
            raise BadModel(f"{where}: do_resize must be true: the model takes whole tokens")
        return cls(rule, ImageProcessorConfig.parse(_without_size(settings), where, _KINDS))

    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        patch, merge, rows, columns = self.rule.patch, self.rule.merge, picture.rows, picture.columns
        size = rows * merge * patch, columns * merge * patch
        whole = preprocess(image, replace(self.config, resize=size), max_pixels)
        blocks = whole.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        shown = np.broadcast_to(blocks[..., None, :, :], (*blocks.shape[:5], FRAMES, patch, patch))
        return np.ascontiguousarray(shown).reshape(rows * columns * merge**2, -1)

    def rope(self, length: int, places: Sequence[tuple[int, Picture]]) -> RopePositions | None:
        """Time stands still within a picture; text goes on behind the largest coordinate of the picture before it."""
        if not places:
            return None
        coordinates = np.empty((3, length), dtype=np.int32)
        end = position = 0
        for start, picture in places:
            coordinates[:, end:start] = np.arange(position, position + start - end)
            position, end = position + start - end, start + picture.tokens
            row, column = np.divmod(np.arange(picture.tokens), picture.columns)
            coordinates[:, start:end] = position + np.stack([np.zeros_like(row), row, column])
            position += max(picture.rows, picture.columns)
        coordinates[:, end:] = np.arange(position, position + length - end)
        return RopePositions(coordinates, position + length - end)


def _without_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of the settings: the size is the picture's own."""
    return {**settings, "size": {"height": 1, "width": 1}}


def open_codec(spec: QwenSpec, directory: Path) -> PatchCodec:
    """By the settings in ``directory``."""
    return PatchCodec.open(directory, spec.picture)
