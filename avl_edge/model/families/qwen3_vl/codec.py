"""Videos of Qwen3-VL: between two moments their time stands as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ....config import Picture
from ....request import RopePositions
from ...images.frames import TOGETHER, Moment
from ..qwen2_vl.codec import PatchCodec
from .spec import Qwen3VlSpec


@dataclass(frozen=True)
class StampedCodec(PatchCodec):
    """Each moment stands alone, as a picture does. The range of pixels is that of a whole video."""

    def measure_moment(self, width: int, height: int, moment: Moment) -> Picture:
        count, edge = moment.count, self.rule.merge * self.rule.patch
        if min(width, height) < edge:
            scale = max(edge / height, edge / width)
            width, height = int(width * scale), int(height * scale)
        # Limits of the whole become those of a frame; they are looked at for an even number of frames.
        wide, high = (round(length / edge) * edge for length in (width, height))
        all_pixels = round(count / TOGETHER) * TOGETHER * wide * high
        if all_pixels > self.video_rule.max_pixels:
            shrink = math.sqrt(count * height * width / self.video_rule.max_pixels)
            wide, high = (max(edge, math.floor(length / shrink / edge) * edge) for length in (width, height))
        elif all_pixels < self.video_rule.min_pixels:
            stretch = math.sqrt(self.video_rule.min_pixels / (count * height * width))
            wide, high = (math.ceil(length * stretch / edge) * edge for length in (width, height))
        found = replace(self.rule, min_pixels=1, max_pixels=wide * high)(wide, high)
        return replace(found, moment=moment.number, seconds=moment.seconds)

    def video_placeholder(self, moments: Sequence[Picture]) -> str:
        stamps = [f"<{sum(each.seconds) / TOGETHER:.1f} seconds>" for each in moments]
        shown = [f"<|vision_start|>{self.video_token * each.tokens}<|vision_end|>" for each in moments]
        return "".join(map("".join, zip(stamps, shown, strict=True)))

    def rope(self, length: int, places: Sequence[tuple[int, Picture]]) -> RopePositions | None:
        return super().rope(length, [(start, replace(picture, moment=None)) for start, picture in places])


def open_codec(spec: Qwen3VlSpec, directory: Path) -> StampedCodec:
    """By the settings in ``directory``."""
    found = PatchCodec.open(directory, spec.picture)
    return StampedCodec(found.rule, found.video_rule, found.config)
