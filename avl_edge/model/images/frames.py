"""A video, as pictures with times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...errors import BadInput
from .inputs import ImageSource, check_sources, is_list_of_sources
from .sources import MAX_PIXELS, take_sources

TOGETHER = 2
"""Frames that a model looks at as one."""


@dataclass(frozen=True)
class Moment:
    """Two frames of a video that are encoded together: the ``number``-th such two of a video of ``count`` frames, and
    their times in ``seconds``. A last frame without another stands twice."""

    frames: tuple[ImageSource, ImageSource]
    number: int
    seconds: tuple[float, float]
    count: int


Shown: TypeAlias = "ImageSource | Moment"


@dataclass(frozen=True)
class Frames:
    """Frames of a video, of one size, and their times: ``seconds`` from its beginning, ascending."""

    pictures: Sequence[ImageSource]
    seconds: Sequence[float]

    @classmethod
    def of(cls, pictures: Sequence[ImageSource], fps: float) -> Frames:
        """Frames of which there are so many a second."""
        if not isinstance(fps, int | float) or not 0.001 <= fps <= 1000:
            raise BadInput(f"fps must be from 0.001 to 1000, not {fps!r}")
        return cls(pictures, [number / fps for number in range(len(pictures))])

    def __post_init__(self) -> None:
        check_sources(self.pictures)
        times = list(self.seconds)
        if len(self.pictures) < TOGETHER:
            raise BadInput("a video has two frames or more: show a single one as a picture")
        if len(times) != len(self.pictures):
            raise BadInput(f"a video of {len(self.pictures)} frames has as many times, not {len(times)}")
        if not all(isinstance(each, int | float) and math.isfinite(each) and 0 <= each < 1e6 for each in times):
            raise BadInput("the times of frames are seconds from the beginning of their video")
        if times != sorted(times):
            raise BadInput("the times of frames must ascend")

    def moments(self) -> list[Moment]:
        """Two frames at a time."""
        pairs = [(at, min(at + 1, len(self.pictures) - 1)) for at in range(0, len(self.pictures), TOGETHER)]
        return [
            Moment(
                (self.pictures[a], self.pictures[b]),
                number,
                (float(self.seconds[a]), float(self.seconds[b])),
                len(self.pictures),
            )
            for number, (a, b) in enumerate(pairs)
        ]


Source: TypeAlias = "ImageSource | Frames"


def check_shown(images: Sequence[Source | Moment]) -> None:
    """Raise BadInput for anything but a list of pictures and videos; nothing is read."""
    if is_list_of_sources(images):
        images = [each for each in images if not isinstance(each, Frames | Moment)]
    check_sources(images)


def take_shown(images: Sequence[Shown], max_pixels: int = MAX_PIXELS) -> list[Shown]:
    """Each picture and each frame as what may be read twice, as :func:`~.sources.take_sources`; a frame that stands in
    two places is read once."""
    check_shown(images)
    taken: dict[int, ImageSource] = {}

    def take(source: ImageSource) -> ImageSource:
        if id(source) not in taken:
            (taken[id(source)],) = take_sources([source], max_pixels)
        return taken[id(source)]

    return [
        replace(each, frames=(take(each.frames[0]), take(each.frames[1]))) if isinstance(each, Moment) else take(each)
        for each in images
    ]
