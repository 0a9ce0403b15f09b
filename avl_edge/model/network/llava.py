"""LLaVA-1.5 (arXiv 2310.03744): CLIP features through a two-layer projector into the decoder's embeddings."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...request import ImageSpan
from ..checkpoint import Weights
from ..spec import ModelSpec
from .clip import VisionTower
from .decoder import Decoder
from .layers import activation


class Llava:
    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        features = spec.vision.hidden_size * len(spec.feature_layers)
        size = spec.text.hidden_size
        self.spec = spec
        self.dtype = weights.dtype
        self.decoder = Decoder(spec.text, weights)
        self._tower = VisionTower(spec.vision, spec.feature_layers, weights)
        self._project1 = weights.linear("projector.linear_1", size, features, bias=spec.projector_bias)
        self._project2 = weights.linear("projector.linear_2", size, size, bias=spec.projector_bias)
        self._activation = activation(spec.projector_activation)

    def encode(self, pixels: npt.NDArray[np.float32]) -> Generator[None, None, Tensor]:
        """float32 ``[images, 3, H, W]`` to ``[images, tokens, hidden]``, one picture after the other; stops between
        two layers of the vision encoder."""
        encoded = []
        for index, picture in enumerate(pixels):
            if index:
                yield
            encoded.append((yield from self._encode(torch.from_numpy(picture[None]).to(self.decoder.embedding))))
        return torch.cat(encoded)

    def _encode(self, pixels: Tensor) -> Generator[None, None, Tensor]:
        features = yield from self._tower.run(pixels)
        if self.spec.drop_class_token:
            features = features[:, 1:]
        return self._project2(self._activation(self._project1(features)))

    def embed(self, token_ids: tuple[int, ...], spans: tuple[ImageSpan, ...], features: Tensor | None) -> Tensor:
        """The prompt's embeddings ``[n, hidden]``, image features in place of their placeholders."""
        embedded = self.decoder.embed(torch.tensor(token_ids))
        for index, span in enumerate(spans):
            assert features is not None
            embedded[span.start : span.start + span.length] = features[index]
        return embedded
