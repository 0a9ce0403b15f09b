"""Qwen2-VL's tower with other layers, most of which see a window of the picture alone."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ...network.layers import RmsNorm
from ...network.vit import Block, GatedMlp, Mlp
from ..qwen2_vl.network import EPS, PatchEmbedding, angles_of
from .spec import Qwen25VlSpec


class VisionEncoder:
    """The tower and the merger of ``spec``."""

    def __init__(self, spec: Qwen25VlSpec, weights: Weights) -> None:
        self._spec, size = spec, spec.vision.hidden_size
        self._embed = PatchEmbedding(spec, weights)
        self._blocks = [self._block(weights, f"vision.blocks.{index}") for index in range(spec.vision.layers)]
        self._norm = RmsNorm.take(weights, "vision.merger.ln_q", size, EPS)
        self._block_size = spec.vision.merge**2
        width = self._block_size * size
        sizes = (width, width, spec.text.hidden_size)
        self._merger = Mlp(weights, "vision.merger.mlp.0", "vision.merger.mlp.2", sizes, "gelu")

    def _block(self, weights: Weights, name: str) -> Block:
        vision = self._spec.vision
        size = vision.hidden_size
        norms = RmsNorm.take(weights, f"{name}.norm1", size, EPS), RmsNorm.take(weights, f"{name}.norm2", size, EPS)
        mlp = GatedMlp(weights, f"{name}.mlp", size, vision.intermediate_size, vision.activation)
        return Block(weights, name, size, vision.heads, norms, mlp)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture; stops between two layers."""
        order, lengths = windows(pixels.picture.rows, pixels.picture.columns, self._spec.window)
        order = order.to(like.device)
        patches = self._embed(torch.from_numpy(pixels.values).to(like))
        x = self._by_windows(patches, order)
        cos, sin = (self._by_windows(each, order) for each in angles_of(self._spec, pixels, like.device))
        seen = [length * self._block_size for length in lengths]
        for index, block in enumerate(self._blocks):
            if index:
                yield
            x = block(x, (cos, sin), None if index in self._spec.whole_layers else seen)
        merged = self._merger(self._norm(x).view(len(order), -1))
        return ImageFeatures(merged[order.argsort()])

    def _by_windows(self, patches: Tensor, order: Tensor) -> Tensor:
        """Patches ``[n, ...]`` in the order of their windows."""
        return patches.view(len(order), self._block_size, *patches.shape[1:])[order].flatten(0, 1)


def windows(rows: int, columns: int, edge: int) -> tuple[Tensor, list[int]]:
    """The tokens of ``rows`` x ``columns`` window by window, each of ``edge`` x ``edge`` or what the picture leaves for
    it: their numbers int64 ``[n]``, and how many each window has."""
    down, across = torch.arange(rows) // edge, torch.arange(columns) // edge
    window = (down[:, None] * -(-columns // edge) + across).flatten()
    return window.argsort(stable=True), window.bincount().tolist()
