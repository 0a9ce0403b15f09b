"""Pictures of InternVL: stretched to as many tiles as come closest to their shape, and a thumbnail beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....config import Picture
from ....errors import BadModel, quoted
from ...image_settings import find_image_settings

MOST_TILES = 12
"""Of a picture, where the settings do not say."""
_LARGEST_GRID = 256


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
