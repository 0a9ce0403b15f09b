"""InternViT, whose layers are scaled channel by channel, a pixel shuffle and a projector."""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ...network.layers import LayerNorm, RmsNorm
from ...network.vit import Mlp
from ...weights import Dense
from .spec import InternVlSpec
from .vit_spec import InternVitSpec

_HEAD_NORM_EPS, _PROJECTOR_EPS = 1e-6, 1e-5


class VisionEncoder:
    """The tower and the projector of ``spec``."""

    def __init__(self, spec: InternVlSpec, weights: Weights) -> None:
        vision, self._merge, hidden = spec.vision, spec.merge, spec.text.hidden_size
        size, patch, self._side = vision.hidden_size, vision.patch_size, vision.side
        name = "vision.embeddings"
        kernel = weights.take(f"{name}.patch_embeddings.projection.weight", size, 3, patch, patch)
        self._embed = Dense(kernel.flatten(1), weights.take(f"{name}.patch_embeddings.projection.bias", size))
        self._class_token = weights.take(f"{name}.cls_token", 1, 1, size)
        self._positions = weights.take(f"{name}.position_embeddings", 1, 1 + vision.side**2, size)
        self._layers = [_Layer(vision, f"vision.encoder.layer.{n}", weights) for n in range(spec.feature_layer)]
        self._last_norm = (
            LayerNorm.take(weights, "vision.layernorm", size, vision.norm_eps) if vision.last_norm else None
        )
        width = spec.merge**2 * size
        self._norm = LayerNorm.take(weights, "projector.layer_norm", width, _PROJECTOR_EPS)
        sizes = (width, hidden, hidden)
        self._project = Mlp(weights, "projector.linear_1", "projector.linear_2", sizes, spec.projector_activation)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture, tile by tile; stops between two layers."""
        tiles = torch.from_numpy(pixels.values).to(like)
        patches = tiles.view(len(tiles), 3, self._side, -1, self._side, tiles.shape[-1] // self._side)
        embedded = self._embed(patches.permute(0, 2, 4, 1, 3, 5).reshape(len(tiles), self._side**2, -1))
        x = torch.cat([self._class_token.expand(len(tiles), -1, -1), embedded], dim=1) + self._positions
        for index, layer in enumerate(self._layers):
            if index:
                yield
            x = layer(x)
        if self._last_norm:
            x = self._last_norm(x)
        return ImageFeatures(self._project(self._norm(self._shuffled(x[:, 1:]))).flatten(0, 1))

    def _shuffled(self, patches: Tensor) -> Tensor:
        """``[tiles, patches, size]`` to ``[tiles, tokens, width]``: the patches of a block side by side."""
        count, merge = self._side // self._merge, self._merge
        blocks = patches.reshape(len(patches), count, merge, count, merge, -1).transpose(2, 3)
        return blocks.reshape(len(patches), count**2, -1)


class _Layer:
    def __init__(self, spec: InternVitSpec, name: str, weights: Weights) -> None:
        size, self._heads, norm = spec.hidden_size, spec.heads, RmsNorm if spec.rms else LayerNorm
        self._norm1 = norm.take(weights, f"{name}.layernorm_before", size, spec.norm_eps)
        self._norm2 = norm.take(weights, f"{name}.layernorm_after", size, spec.norm_eps)
        self._query, self._key, self._value = (
            weights.linear(f"{name}.attention.{each}_proj", size, size, bias=spec.qkv_bias) for each in "qkv"
        )
        self._query_norm = self._key_norm = None
        if spec.head_norms:
            self._query_norm = RmsNorm.take(weights, f"{name}.attention.q_norm", size, _HEAD_NORM_EPS)
            self._key_norm = RmsNorm.take(weights, f"{name}.attention.k_norm", size, _HEAD_NORM_EPS)
        self._out = weights.linear(f"{name}.attention.projection_layer", size, size, bias=True)
        self._scale1, self._scale2 = weights.take(f"{name}.lambda_1", size), weights.take(f"{name}.lambda_2", size)
        sizes = (size, spec.intermediate_size, size)
        self._mlp = Mlp(weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2", sizes, spec.activation)

    def __call__(self, x: Tensor) -> Tensor:
        x = self._scale1 * self._attention(self._norm1(x)) + x
        return self._scale2 * self._mlp(self._norm2(x)) + x

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = self._query(x), self._key(x), self._value(x)
        if self._query_norm and self._key_norm:
            query, key = self._query_norm(query), self._key_norm(key)
        query, key, value = (each.view(*x.shape[:2], self._heads, -1).transpose(1, 2) for each in (query, key, value))
        return self._out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
