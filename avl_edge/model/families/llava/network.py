"""CLIP features through a projector of two layers into the decoder's embeddings."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.clip import VisionTower
from ...network.image_features import ImageFeatures
from ...network.layers import activation
from .spec import ClipModelSpec


class VisionEncoder:
    """The tower and the projector of ``spec``."""

    def __init__(self, spec: ClipModelSpec, weights: Weights) -> None:
        features = spec.vision.hidden_size * len(spec.feature_layers)
        size = spec.text.hidden_size
        self._drops_class_token = spec.drop_class_token
        self._tower = VisionTower(spec.vision, spec.feature_layers, weights)
        self._project1 = weights.linear("projector.linear_1", size, features, bias=spec.projector_bias)
        self._project2 = weights.linear("projector.linear_2", size, size, bias=spec.projector_bias)
        self._activation = activation(spec.projector_activation)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture; stops between two layers. ``like``: a tensor on the model's device, in its
        dtype."""
        features = yield from self.squares(torch.from_numpy(pixels.values[None]).to(like))
        return ImageFeatures(features[0])

    def squares(self, pixels: Tensor) -> Generator[None, None, Tensor]:
        """``[squares, 3, H, W]`` in the model's dtype to ``[squares, tokens, hidden]``; stops between two layers."""
        features = yield from self._tower.run(pixels)
        if self._drops_class_token:
            features = features[:, 1:]
        return self._project2(self._activation(self._project1(features)))
