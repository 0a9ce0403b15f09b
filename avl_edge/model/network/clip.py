"""CLIP's vision transformer (arXiv 2103.00020): pixels to patch features."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Weights
from ..clip_config import ClipSpec
from ..weights.linear import slow_half
from .layers import LayerNorm, activation


class VisionTower:
    """Runs only as many layers as the features asked for need."""

    def __init__(self, spec: ClipSpec, feature_layers: Sequence[int], weights: Weights) -> None:
        size, patch = spec.hidden_size, spec.patch_size
        self._spec = spec
        self._feature_layers = tuple(feature_layers)
        self._patches = weights.take("vision.embeddings.patch_embedding.weight", size, 3, patch, patch)
        self._class_token = weights.take("vision.embeddings.class_embedding", size)
        self._positions = weights.take("vision.embeddings.position_embedding.weight", spec.patches + 1, size)
        self._pre_norm = LayerNorm.take(weights, "vision.pre_layrnorm", size, spec.norm_eps)
        needed = max(self._feature_layers)
        self._layers = [_Layer(spec, f"vision.encoder.layers.{index}", weights) for index in range(needed)]

    def run(self, pixels: Tensor) -> Generator[None, None, Tensor]:
        """``[images, 3, H, W]`` in the model's dtype to ``[images, 1 + patches, features]``, class token first; stops
        between two layers."""
        x = self._patchify(pixels).flatten(2).mT
        x = torch.cat([self._class_token.expand(len(x), 1, -1), x], dim=1) + self._positions
        x = self._pre_norm(x)
        states = {0: x} if 0 in self._feature_layers else {}
        for index, layer in enumerate(self._layers, 1):
            if index > 1:
                yield
            x = layer(x)
            if index in self._feature_layers:
                states[index] = x
        return torch.cat([states[index] for index in self._feature_layers], dim=-1)

    def _patchify(self, pixels: Tensor) -> Tensor:
        """``[images, hidden, rows, columns]`` of patches."""
        if slow_half(pixels):
            patches = F.conv2d(pixels.float(), self._patches.float(), stride=self._spec.patch_size)
            return patches.to(pixels.dtype)
        return F.conv2d(pixels, self._patches, stride=self._spec.patch_size)


class _Layer:
    def __init__(self, spec: ClipSpec, name: str, weights: Weights) -> None:
        size, inner = spec.hidden_size, spec.intermediate_size
        self._heads = spec.heads
        self._norm1 = LayerNorm.take(weights, f"{name}.layer_norm1", size, spec.norm_eps)
        self._norm2 = LayerNorm.take(weights, f"{name}.layer_norm2", size, spec.norm_eps)
        self._query = weights.linear(f"{name}.self_attn.q_proj", size, size, bias=True)
        self._key = weights.linear(f"{name}.self_attn.k_proj", size, size, bias=True)
        self._value = weights.linear(f"{name}.self_attn.v_proj", size, size, bias=True)
        self._out = weights.linear(f"{name}.self_attn.out_proj", size, size, bias=True)
        self._up = weights.linear(f"{name}.mlp.fc1", inner, size, bias=True)
        self._down = weights.linear(f"{name}.mlp.fc2", size, inner, bias=True)
        self._activation = activation(spec.activation)

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self._attention(self._norm1(x))
        return x + self._down(self._activation(self._up(self._norm2(x))))

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).view(*x.shape[:2], self._heads, -1).transpose(1, 2)
            for part in (self._query, self._key, self._value)
        )
        return self._out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
