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
from typing import Any

import torch
from torch import Tensor

from ..weight_format import WeightFormat, WeightFormats
from .linear import Grouped
from .packing import signed, unpacked, words
from .stored import CONVERT, StoredLayer

_PLAIN_MODULES = [f"re:.*{name}.*" for name in ("vision_tower", "visual", "multi_modal_projector")]
"""Of all families, what is no decoder."""


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
    packed = layer.take("weight_packed", torch.int32)
    bits = 8 if packed.shape[-1] == -(-layer.inputs // 4) else 4
    layer.require_shape("weight_packed", packed, (layer.outputs, -(-layer.inputs * bits // 32)))
    shape = layer.shaped("weight_shape", torch.int64, 2)
    if shape.tolist() != [layer.outputs, layer.inputs]:
        raise layer.bad("weight_shape", f"says {shape.tolist()}, not {[layer.outputs, layer.inputs]}: copy it again")
    scales = _scales(layer)
    zeros, order = _zeros(layer, bits, scales.shape[1]), _order(layer, scales.shape[1])
    if bits == 4 and order is None:
        return layer.packed(packed.contiguous().view(torch.uint8), scales, zeros, bits, None, "weight_scale")
    return layer.grouped(unpacked(packed, bits)[:, : layer.inputs], scales, zeros, bits, order, "weight_scale")


def _scales(layer: StoredLayer) -> Tensor:
    scales = layer.scales("weight_scale")
    layer.require_shape("weight_scale", scales, (layer.outputs, layer.groups("weight_scale", scales.shape[1])))
    return scales


def _zeros(layer: StoredLayer, bits: int, groups: int) -> Tensor | None:
    """uint8 ``[outputs, groups]``."""
    if not layer.has("weight_zero_point"):
        return None
    packed = layer.shaped("weight_zero_point", torch.int32, -(-layer.outputs * bits // 32), groups)
    return unpacked(packed.T, bits).T[: layer.outputs].contiguous()


def _order(layer: StoredLayer, groups: int) -> Tensor | None:
    part = "weight_g_idx"
    if not layer.has(part) or bool((layer.take(part, torch.int32) == -1).all()):
        return None
    return layer.order(part, groups)


def stored_parts(layer: Grouped, dtype: torch.dtype) -> dict[str, Tensor]:
    """``pack-quantized`` tensors of a symmetric layer, scales in ``dtype``."""
    assert layer.zeros is None, "symmetric"
    assert layer.order is None, "columns are in the order of the inputs"
    codes = signed(layer.codes.view(torch.uint8)).view(torch.uint8) if layer.bits == 8 else layer.codes
    return {
        "weight_packed": words(codes),
        "weight_scale": layer.scales.to(dtype),
        "weight_shape": torch.tensor([layer.outputs, layer.inputs]),
    }


def quantization_config(formats: WeightFormats) -> dict[str, Any]:
    """config.json's section about a checkpoint whose decoder is stored as ``formats``, all else plain."""
    targets = {"re:.*language_model.*_proj$": formats.body, "re:.*lm_head$": formats.head}
    packed = {target: form for target, form in targets.items() if form is not None}
    plain = [target for target in targets if target not in packed]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": [target], "weights": _weights(form)}
            for number, (target, form) in enumerate(packed.items())
        },
        "ignore": [*_PLAIN_MODULES, *plain],
    }


def _weights(form: WeightFormat) -> dict[str, Any]:
    grouping = {"strategy": "channel"} if form.group is None else {"strategy": "group", "group_size": form.group}
    return {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False, **grouping}
