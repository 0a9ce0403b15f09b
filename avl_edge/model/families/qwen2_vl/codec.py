"""Pictures of the Qwens as pixels and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....config import Picture, require
from ....errors import BadModel, quoted
from ....request import RopePositions
from ...image_settings import read_image_settings
from ...images.config import CLIP, ImageProcessorConfig
from ...images.frames import Moment
from ...images.preprocess import preprocess
from ...prompt.codec import ImageCodec
from .pictures import FRAMES, Merged, read_video_limits
from .spec import QwenSpec

_DEFAULTS = dict(CLIP) | {"do_center_crop": False, "patch_size": 14, "temporal_patch_size": FRAMES, "merge_size": 2}
_KINDS = {"Qwen2VLImageProcessor": _DEFAULTS}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PatchCodec(ImageCodec):
    """``pixels`` are ``[patches, 3 * FRAMES * patch * patch]``, in blocks of those that become one token.

    A video's moments touch each other. ``ticks``: coordinates of time in a second; None: one for each moment.
    """

    image_token: ClassVar[str] = "<|image_pad|>"
    chat_template: ClassVar[str] = _CHAT_TEMPLATE
    transparency: ClassVar[str] = "white"

    rule: Merged
    video_rule: Merged
    config: ImageProcessorConfig
    ticks: float | None = None

    @classmethod
    def open(cls, directory: Path, rule: Merged, ticks: float | None = None) -> PatchCodec:
        """By the processors' settings in ``directory``."""
        settings, where = read_image_settings(directory)
        if not isinstance(settings, Mapping):
            raise BadModel(f"{where}: the image processor's settings must be a JSON object")
        expected = {"patch_size": rule.patch, "merge_size": rule.merge, "temporal_patch_size": FRAMES}
        for key, value in expected.items():
            if settings.get(key, _DEFAULTS[key]) != value:
                raise BadModel(f"{where}: {key} is {quoted(settings[key])}, but the model's is {value}")
        if settings.get("do_resize", True) is not True:
            raise BadModel(f"{where}: do_resize must be true: the model takes whole tokens")
        least, most = read_video_limits(directory, rule.min_pixels, rule.max_pixels)
        of_video = replace(rule, min_pixels=least, max_pixels=most)
        return cls(rule, of_video, ImageProcessorConfig.parse(_without_size(settings), where, _KINDS), ticks)

    @property
    def video_token(self) -> str:
        return "<|video_pad|>"

    def within(self, min_pixels: int | None, max_pixels: int | None) -> PatchCodec:
        least = self.rule.min_pixels if min_pixels is None else min_pixels
        most = self.rule.max_pixels if max_pixels is None else max_pixels
        require(least <= most, f"pictures cannot have {least} pixels at least and {most} at most: give both limits")
        of_picture, of_video = (
            replace(each, min_pixels=least, max_pixels=most) for each in (self.rule, self.video_rule)
        )
        return replace(self, rule=of_picture, video_rule=of_video)

    def measure_moment(self, width: int, height: int, moment: Moment) -> Picture:
        return replace(self.video_rule(width, height), moment=moment.number, seconds=moment.seconds)

    def video_placeholder(self, moments: Sequence[Picture]) -> str:
        return self.video_token * sum(each.tokens for each in moments)

    def pixels(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        blocks = self._blocks(image, picture, max_pixels)
        shown = np.broadcast_to(blocks[..., None, :, :], (*blocks.shape[:5], FRAMES, *blocks.shape[5:]))
        return np.ascontiguousarray(shown).reshape(picture.patches, -1)

    def moment_pixels(
        self, frames: tuple[Image.Image, Image.Image], picture: Picture, max_pixels: int
    ) -> npt.NDArray[np.float32]:
        blocks = [self._blocks(each, picture, max_pixels) for each in frames]
        return np.stack(blocks, axis=-3).reshape(picture.patches, -1)

    def _blocks(self, image: Image.Image, picture: Picture, max_pixels: int) -> npt.NDArray[np.float32]:
        """``[rows, columns, merge, merge, 3, patch, patch]``."""
        patch, merge, rows, columns = self.rule.patch, self.rule.merge, picture.rows, picture.columns
        size = rows * merge * patch, columns * merge * patch
        whole = preprocess(image, replace(self.config, resize=size), max_pixels)
        blocks: npt.NDArray[np.float32] = whole.reshape(3, rows, merge, patch, columns, merge, patch)
        return np.transpose(blocks, (1, 4, 2, 5, 0, 3, 6))

    def rope(self, length: int, places: Sequence[tuple[int, Picture]]) -> RopePositions | None:
        """Time stands still within a picture, and goes on from moment to moment of a video; text goes on behind the
        largest row or column before it, as transformers counts."""
        if not places:
            return None
        coordinates = np.empty((3, length), dtype=np.int32)
        end = position = origin = 0
        began = 0.0
        for start, picture in places:
            coordinates[:, end:start] = np.arange(position, position + start - end)
            if not picture.moment:  # what goes on in a video begins where that began
                origin, began = position + start - end, picture.seconds[0]
            end = start + picture.tokens
            row, column = np.divmod(np.arange(picture.tokens), picture.columns)
            time = np.full_like(row, self._ticks(picture, began))
            coordinates[:, start:end] = origin + np.stack([time, row, column])
            position = origin + max(picture.rows, picture.columns)
        coordinates[:, end:] = np.arange(position, position + length - end)
        return RopePositions(coordinates, position + length - end)

    def _ticks(self, picture: Picture, began: float) -> int:
        """The coordinate of time in a video whose first frame is from ``began``, in seconds."""
        return (picture.moment or 0) if self.ticks is None else int(self.ticks * (picture.seconds[0] - began))


def _without_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of the settings: the size is the picture's own."""
    return {**settings, "size": {"height": 1, "width": 1}}


def open_codec(spec: QwenSpec, directory: Path) -> PatchCodec:
    """By the settings in ``directory``."""
    return PatchCodec.open(directory, spec.picture, spec.ticks)
