"""From the size of a picture to patches and tokens, one rule per family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..config import require


@dataclass(frozen=True)
class Picture:
    """``crops`` runs of the vision encoder over ``patches`` each give ``tokens`` for the decoder."""

    crops: int
    patches: int
    tokens: int


class PictureRule(Protocol):
    """How a family of models cuts a picture."""

    def __call__(self, width: int, height: int) -> Picture: ...


@dataclass(frozen=True)
class Fixed:
    """Every picture is made one square: LLaVA-1.5, Qwen-VL."""

    patches: int
    tokens: int

    @classmethod
    def clip(cls, patches: int, *, drop_class_token: bool = True) -> Fixed:
        """Of a CLIP tower over ``patches``: its class token runs along, and is dropped from the features or not."""
        return cls(patches + 1, patches + (not drop_class_token))

    def __call__(self, width: int, height: int) -> Picture:  # noqa: ARG002
        return Picture(1, self.patches, self.tokens)


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-1.6: a square overview, and the picture in tiles whose padding is cut off again.

    ``crop``: edge in pixels of a tile; ``side``: patches along it; ``grids``: the (rows, columns) of tiles there are.
    One newline token ends each row of patches.
    """

    crop: int = 336
    side: int = 24
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

    def __call__(self, width: int, height: int) -> Picture:
        rows, columns = self.grid(width, height)
        high, wide = rows * self.side, columns * self.side
        if width * high > wide * height:  # wider than the grid: rows of padding above and below
            content = int(round(height * (wide / width), 7))
            high -= (high - content) // 2 * 2
        else:
            content = int(round(width * (high / height), 7))
            wide -= (wide - content) // 2 * 2
        tile = Fixed.clip(self.side**2)
        return Picture(1 + rows * columns, tile.patches, tile.tokens + high * wide + high)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The tiles that keep most of the picture's pixels, and waste the fewest of their own."""

        def keeps(grid: tuple[int, int]) -> tuple[int, int]:
            high, wide = grid[0] * self.crop, grid[1] * self.crop
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, -(wide * high - kept)

        return max(self.grids, key=keeps)


@dataclass(frozen=True)
class Merged:
    """Qwen2-VL and later: the picture keeps its shape, in multiples of two patches, within a range of pixels."""

    patch: int
    min_pixels: int
    max_pixels: int

    def __call__(self, width: int, height: int) -> Picture:
        require(max(width, height) <= 200 * min(width, height), "a picture may be at most 200 times as long as wide")
        edge = 2 * self.patch
        wide, high = (max(edge, round(length / edge) * edge) for length in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(edge, math.floor(length / shrink / edge) * edge) for length in (width, height))
        elif wide * high < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(length * stretch / edge) * edge for length in (width, height))
        tokens = (wide // edge) * (high // edge)
        return Picture(1, 4 * tokens, tokens)
