"""A transformer over patches, and a merger that makes a token of each block of them."""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ...network.layers import LayerNorm
from ...network.vit import Block, Mlp, axial_angles, in_blocks
from .spec import Qwen2VlSpec, QwenSpec

EPS = 1e-6


class PatchEmbedding:
    """A convolution over patches that do not overlap: one matrix."""

    def __init__(self, spec: QwenSpec, weights: Weights, *, bias: bool = False) -> None:
        size, patch = spec.vision.hidden_size, spec.vision.patch_size
        name = "vision.patch_embed.proj"
        shape = (size, 3, spec.vision.patch_values // (3 * patch**2), patch, patch)
        self._weight = weights.take(f"{name}.weight", *shape).flatten(1)
        self._bias = weights.take(f"{name}.bias", size) if bias else None

    def __call__(self, values: Tensor) -> Tensor:
        """``[patches, numbers]`` to ``[patches, hidden]``."""
        return F.linear(values, self._weight, self._bias)


def angles_of(spec: QwenSpec, pixels: PixelValues, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a picture's patches."""
    row, column = in_blocks(pixels.picture.rows, pixels.picture.columns, spec.vision.merge)
    return axial_angles(row.to(device), column.to(device), spec.vision.head_dim, spec.vision.theta)


class VisionEncoder:
    """The tower and the merger of ``spec``."""

    def __init__(self, spec: Qwen2VlSpec, weights: Weights) -> None:
        self._spec, size = spec, spec.vision.hidden_size
        self._embed = PatchEmbedding(spec, weights)
        self._blocks = [self._block(weights, f"vision.blocks.{index}") for index in range(spec.vision.layers)]
        self._norm = LayerNorm.take(weights, "vision.merger.ln_q", size, EPS)
        self._width = spec.vision.merge**2 * size
        sizes = (self._width, self._width, spec.text.hidden_size)
        self._merger = Mlp(weights, "vision.merger.mlp.0", "vision.merger.mlp.2", sizes, "gelu")

    def _block(self, weights: Weights, name: str) -> Block:
        vision = self._spec.vision
        size, inner = vision.hidden_size, vision.intermediate_size
        norms = (
            LayerNorm.take(weights, f"{name}.norm1", size, EPS),
            LayerNorm.take(weights, f"{name}.norm2", size, EPS),
        )
        mlp = Mlp(weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2", (size, inner, size), vision.activation)
        return Block(weights, name, size, vision.heads, norms, mlp)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture; stops between two layers."""
        x = self._embed(torch.from_numpy(pixels.values).to(like))
        angles = angles_of(self._spec, pixels, like.device)
        for index, block in enumerate(self._blocks):
            if index:
                yield
            x = block(x, angles)
        return ImageFeatures(self._merger(self._norm(x).view(-1, self._width)))
