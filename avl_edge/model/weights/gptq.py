"""GPTQ's layout (arXiv 2210.17323), as AutoGPTQ, GPTQModel and auto-round write it: 4 bits, or 8 without zero points.

N outputs, K inputs, G groups: ``qweight`` int32 ``[K * bits / 32, N]`` packed along the inputs, ``qzeros`` int32 ``[G,
N * bits / 32]`` packed along the outputs, ``scales [G, N]``, and ``g_idx`` int32 ``[K]``, the group of each input
(with ``desc_act`` by the order of activations). Version 1 (``checkpoint_format: gptq``) stores a zero point less one,
in as many bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import Grouped
from .packing import unpacked
from .stored import CONVERT, StoredLayer


@dataclass(frozen=True)
class Gptq:
    """``zero_offset`` is what a stored zero point lacks: 1 in version 1, 0 in version 2."""

    zero_offset: int

    def stores(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        return f"{name}.qweight" in tensors

    def read(self, layer: StoredLayer) -> Grouped:
        scales = layer.scales("scales")
        groups = layer.groups("scales", len(scales))
        layer.require_shape("scales", scales, (groups, layer.outputs))
        words = layer.take("qweight", torch.int32)
        bits = 8 if len(words) * 4 == layer.inputs else 4
        layer.require_shape("qweight", words, (layer.inputs * bits // 32, layer.outputs))
        if layer.outputs * bits % 32:
            raise layer.bad("qzeros", f"belongs to {layer.outputs} outputs, which do not fill its words{CONVERT}")
        stored = unpacked(layer.shaped("qzeros", torch.int32, groups, layer.outputs * bits // 32), bits)
        zeros = (stored + self.zero_offset) & ((1 << bits) - 1)
        order = layer.order("g_idx", groups) if layer.has("g_idx") else None
        return layer.grouped(unpacked(words.T, bits), scales.T, zeros.T, bits, order, "scales")
