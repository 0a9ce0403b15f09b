"""AutoAWQ's ``gemm`` layout (arXiv 2306.00978): 4 bits, always with zero points.

N outputs, K inputs, G groups of inputs: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[G, N / 8]``, ``scales [G,
N]``. The eight numbers of a word, lowest bits first, are those of outputs 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .linear import Grouped
from .packing import unpacked
from .stored import CONVERT, StoredLayer

_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word output i of eight is."""


class Awq:
    def stores(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        return f"{name}.qweight" in tensors

    def read(self, layer: StoredLayer) -> Grouped:
        scales = layer.scales("scales")
        groups = layer.groups("scales", len(scales))
        layer.require_shape("scales", scales, (groups, layer.outputs))
        if layer.outputs % 8:
            raise layer.bad("qweight", f"belongs to {layer.outputs} outputs, which are no words of eight{CONVERT}")
        words = layer.shaped("qweight", torch.int32, layer.inputs, layer.outputs // 8)
        zeros = layer.shaped("qzeros", torch.int32, groups, layer.outputs // 8)
        return layer.grouped(_numbers(words).T, scales.T, _numbers(zeros).T, 4, None, "scales")


def _numbers(words: Tensor) -> Tensor:
    """int32 ``[rows, n]`` to uint8 ``[rows, 8 * n]``."""
    return unpacked(words, 4).view(len(words), -1, 8)[..., _PLACES].flatten(1)
