"""LLaVA-1.5's encoder for the overview and the tiles, whose features are put together again, row by row."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ....config import Picture
from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ..llava.network import VisionEncoder as SquareEncoder
from .spec import LlavaNextSpec


class VisionEncoder:
    """The tower, the projector and the newline of ``spec``."""

    def __init__(self, spec: LlavaNextSpec, weights: Weights) -> None:
        self._squares = SquareEncoder(spec, weights)
        self._newline = weights.take("newline", spec.text.hidden_size)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture, those of the overview first; stops between two layers."""
        squares = yield from self._squares.squares(torch.from_numpy(pixels.values).to(like))
        return ImageFeatures(torch.cat([squares[0], self._in_rows(squares[1:], pixels.picture)]))

    def _in_rows(self, tiles: Tensor, picture: Picture) -> Tensor:
        """``[tiles, patches, hidden]`` to ``[rows * (columns + 1), hidden]``: unpadded, a newline behind each row."""
        (down, across), size = picture.tiles, tiles.shape[-1]
        side = round(tiles.shape[1] ** 0.5)
        whole = tiles.view(down, across, side, side, size).transpose(1, 2).reshape(down * side, across * side, size)
        top, left = (whole.shape[0] - picture.rows) // 2, (whole.shape[1] - picture.columns) // 2
        content = whole[top : top + picture.rows, left : left + picture.columns]
        return torch.cat([content, self._newline.expand(picture.rows, 1, size)], dim=1).flatten(0, 1)
