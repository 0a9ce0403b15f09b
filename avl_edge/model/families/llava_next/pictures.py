"""Pictures of LLaVA-1.6: a square overview, and the picture in tiles whose padding is cut off again."""

from __future__ import annotations

from dataclasses import dataclass

from ....config import Picture
from ...pictures import Fixed


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
