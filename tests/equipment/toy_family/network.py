"""One matrix."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from avl_edge.model.checkpoint import Weights
from avl_edge.model.network.image_features import ImageFeatures
from avl_edge.request import PixelValues
from tests.equipment.toy_family import ToySpec


class VisionEncoder:
    def __init__(self, spec: ToySpec, weights: Weights) -> None:
        self._matrix = weights.take("vision.colours.weight", spec.text.hidden_size, 3)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        said = torch.from_numpy(pixels.values).to(like) @ self._matrix.T
        yield
        return ImageFeatures(said, (said / 2,))
