"""compressed-tensors, the format of vLLM's llm-compressor: ``pack-quantized`` and ``int-quantized``.

What a layer is, its tensors say; N outputs, K inputs, G groups of a row.

- ``pack-quantized``: ``weight_packed`` int32 ``[N, K * bits / 32]`` (a number + 2^(bits - 1), lowest bits first),
  ``weight_scale [N, G]``, ``weight_shape`` int64 ``[2]``, and, where asymmetric, ``weight_zero_point`` int32 ``[N *
  bits / 32, G]``, packed alike along the outputs. ``weight_g_idx`` int32 ``[K]``: each input's group, or -1 in all.
- ``int-quantized``: ``weight`` int8 ``[N, K]``, ``weight_scale [N, 1]``. Activations, which such a checkpoint means to
  be rounded to 8 bits too, stay as they are: that loses nothing.

4-bit codes are the file's own bytes, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .linear import Grouped
from .packing import unpacked
from .stored import CONVERT, StoredLayer


class CompressedTensors:
    def stores(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        return any(f"{name}.{part}" in tensors for part in ("weight_packed", "weight_scale"))

    def read(self, layer: StoredLayer) -> Grouped:
        if layer.has("weight_global_scale"):
            raise layer.bad("weight_global_scale", f"belongs to a 4-bit float format, which is not served{CONVERT}")
        return _packed(layer) if layer.has("weight_packed") else _plain(layer)


def _plain(layer: StoredLayer) -> Grouped:
    codes = layer.shaped("weight", torch.int8, layer.outputs, layer.inputs)
    scales = _scales(layer)
    if layer.has("weight_zero_point") and bool(layer.take("weight_zero_point", torch.int8).any()):
        raise layer.bad("weight_zero_point", f"gives 8-bit weights zero points{CONVERT}")
    return layer.packed(codes, scales, None, 8, None, "weight_scale")


def _packed(layer: StoredLayer) -> Grouped:
    words = layer.take("weight_packed", torch.int32)
    bits = 8 if words.shape[-1] * 4 == layer.inputs else 4
    layer.require_shape("weight_packed", words, (layer.outputs, layer.inputs * bits // 32))
    shape = layer.shaped("weight_shape", torch.int64, 2)
    if shape.tolist() != [layer.outputs, layer.inputs]:
        raise layer.bad("weight_shape", f"says {shape.tolist()}, not {[layer.outputs, layer.inputs]}: copy it again")
    scales = _scales(layer)
    zeros, order = _zeros(layer, bits, scales.shape[1]), _order(layer, scales.shape[1])
    if bits == 4 and order is None:
        return layer.packed(words.contiguous().view(torch.uint8), scales, zeros, bits, None, "weight_scale")
    return layer.grouped(unpacked(words, bits), scales, zeros, bits, order, "weight_scale")


def _scales(layer: StoredLayer) -> Tensor:
    scales = layer.scales("weight_scale")
    layer.require_shape("weight_scale", scales, (layer.outputs, layer.groups("weight_scale", scales.shape[1])))
    return scales


def _zeros(layer: StoredLayer, bits: int, groups: int) -> Tensor | None:
    """uint8 ``[outputs, groups]``."""
    if not layer.has("weight_zero_point"):
        return None
    words = layer.shaped("weight_zero_point", torch.int32, -(-layer.outputs * bits // 32), groups)
    return unpacked(words.T, bits).T[: layer.outputs].contiguous()


def _order(layer: StoredLayer, groups: int) -> Tensor | None:
    part = "weight_g_idx"
    if not layer.has(part) or bool((layer.take(part, torch.int32) == -1).all()):
        return None
    return layer.order(part, groups)
