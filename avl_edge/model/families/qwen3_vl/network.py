"""Qwen2-VL's tower with learned positions, and a merger for each layer whose output goes to the decoder."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ...network.layers import LayerNorm
from ...network.vit import Block, Mlp, in_blocks
from ..qwen2_vl.network import EPS, PatchEmbedding, angles_of
from .spec import Qwen3VlSpec


class VisionEncoder:
    """The tower and the mergers of ``spec``."""

    def __init__(self, spec: Qwen3VlSpec, weights: Weights) -> None:
        self._spec, size = spec, spec.vision.hidden_size
        self._embed = PatchEmbedding(spec, weights, bias=True)
        self._positions = weights.take("vision.pos_embed.weight", spec.positions**2, size)
        self._blocks = [self._block(weights, f"vision.blocks.{index}") for index in range(spec.vision.layers)]
        self._merger = Merger(spec, weights, "vision.merger", norms_merged=False)
        self._deep = {
            layer: Merger(spec, weights, f"vision.deepstack_merger_list.{number}", norms_merged=True)
            for number, layer in enumerate(spec.deep_layers)
        }

    def _block(self, weights: Weights, name: str) -> Block:
        vision = self._spec.vision
        size, inner = vision.hidden_size, vision.intermediate_size
        norms = (
            LayerNorm.take(weights, f"{name}.norm1", size, EPS),
            LayerNorm.take(weights, f"{name}.norm2", size, EPS),
        )
        mlp = Mlp(weights, f"{name}.mlp.linear_fc1", f"{name}.mlp.linear_fc2", (size, inner, size), vision.activation)
        return Block(weights, name, size, vision.heads, norms, mlp)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture; stops between two layers."""
        x = self._embed(torch.from_numpy(pixels.values).to(like))
        x = x + self._learned(pixels).to(x.dtype)
        angles = angles_of(self._spec, pixels, like.device)
        deep = []
        for index, block in enumerate(self._blocks):
            if index:
                yield
            x = block(x, angles)
            if index in self._deep:
                deep.append(self._deep[index](x))
        return ImageFeatures(self._merger(x), tuple(deep))

    def _learned(self, pixels: PixelValues) -> Tensor:
        """The learned positions of a picture's patches, interpolated so that its corners have those of the square:
        float32 ``[patches, hidden]``."""
        merge, side = self._spec.vision.merge, self._spec.positions
        rows, columns = pixels.picture.rows, pixels.picture.columns
        row, column = in_blocks(rows, columns, merge)
        (top, bottom, below), (left, right, beside) = (
            _between(row, merge * rows, side),
            _between(column, merge * columns, side),
        )
        corners = (
            (top * side + left, (1 - below) * (1 - beside)),
            (top * side + right, (1 - below) * beside),
            (bottom * side + left, below * (1 - beside)),
            (bottom * side + right, below * beside),
        )
        device = self._positions.device
        parts = [self._positions[at.to(device)] * weight[:, None].to(device) for at, weight in corners]
        return torch.stack(parts).sum(0)


def _between(index: Tensor, count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the places ``index`` ``[n]`` among ``count``, where these are spread over ``side`` places: the places before
    and behind, and how far they are on the way between, float32."""
    at = index.float() * (side - 1) / max(count - 1, 1)
    before = at.floor()
    return before.long(), (before.long() + 1).clamp(max=side - 1), at - before


class Merger:
    """Two matrices, from a block of patches to a token; ``norms_merged``: the norm is one over the whole block."""

    def __init__(self, spec: Qwen3VlSpec, weights: Weights, name: str, *, norms_merged: bool) -> None:
        size = spec.vision.hidden_size
        self._width, self._norms_merged = spec.vision.merge**2 * size, norms_merged
        self._norm = LayerNorm.take(weights, f"{name}.norm", self._width if norms_merged else size, EPS)
        sizes = (self._width, self._width, spec.text.hidden_size)
        self._mlp = Mlp(weights, f"{name}.linear_fc1", f"{name}.linear_fc2", sizes, "gelu")

    def __call__(self, x: Tensor) -> Tensor:
        """``[patches, size]`` to ``[tokens, hidden]``."""
        if self._norms_merged:
            return self._mlp(self._norm(x.view(-1, self._width)))
        return self._mlp(self._norm(x).view(-1, self._width))
