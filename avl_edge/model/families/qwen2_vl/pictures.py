"""Pictures of the Qwens: in their own shape, in multiples of a token's pixels, within a range of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....config import Picture, require
from ....errors import BadModel, quoted
from ....files import read_json
from ...image_settings import find_image_settings

FRAMES = 2
"""That a patch covers: a still picture is shown twice."""
_MOST_PIXELS = 1 << 40


@dataclass(frozen=True)
class Merged:
    """``merge`` x ``merge`` patches of ``patch`` x ``patch`` pixels are a token; the picture is resized to whole tokens
    and to ``min_pixels`` up to ``max_pixels``."""

    patch: int
    min_pixels: int
    max_pixels: int
    merge: int = 2

    def __call__(self, width: int, height: int) -> Picture:
        require(max(width, height) <= 200 * min(width, height), "a picture may be at most 200 times as long as wide")
        edge = self.merge * self.patch
        wide, high = (round(length / edge) * edge for length in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(edge, math.floor(length / shrink / edge) * edge) for length in (width, height))
        elif wide * high < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(length * stretch / edge) * edge for length in (width, height))
        rows, columns = high // edge, wide // edge
        return Picture(1, self.merge**2 * rows * columns, rows * columns, rows, columns)

    def heaviest(self, tokens: int) -> list[Picture]:
        return [Picture(1, self.merge**2 * tokens, tokens, 1, tokens)] if tokens else []


def read_limits(directory: Path, least: int, most: int) -> tuple[int, int]:
    """The fewest and the most pixels of a picture by the image processor's settings; ``least`` and ``most`` where a
    directory has none."""
    return _limits(*find_image_settings(directory), least, most)


def read_video_limits(directory: Path, least: int, most: int) -> tuple[int, int]:
    """The same of a video, ``least`` and ``most`` being those of a picture."""
    path = directory / "video_preprocessor_config.json"
    return _limits(read_json(path), str(path), least, most)


def _limits(settings: Any, where: str, least: int, most: int) -> tuple[int, int]:
    if not isinstance(settings, Mapping):
        return least, most
    size = settings.get("size")
    size = size if isinstance(size, Mapping) else {}
    limits = (
        settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
    )
    if any(type(each) is not int for each in limits) or not 0 < limits[0] <= limits[1] <= _MOST_PIXELS:
        raise BadModel(f"{where}: min_pixels and max_pixels must be numbers of pixels, not {quoted(list(limits))}")
    return limits
