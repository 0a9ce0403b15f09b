"""The published Qwen2.5-VL models, by the sizes in their config.json files."""

from __future__ import annotations

from ...sizes import DecoderShape, ModelShape, VisionShape
from ..qwen2_vl.published import PICTURES, merger_parameters
from ..qwen2_vl.vit_spec import PatchVitSpec

_VIT = PatchVitSpec(1280, 3420, 32, 16, 14, 2, "silu")


def vision_shape(vit: PatchVitSpec, hidden: int, window: int, whole_layers: int) -> VisionShape:
    """The tower and the merger, which gives ``hidden`` features; ``window``: tokens along the edge of a window."""
    width, inner = vit.hidden_size, vit.intermediate_size
    small = 4 * width + 2 * inner + width + 2 * width
    outside = vit.patch_values * width + width + merger_parameters(vit, hidden)
    seen = (window * vit.merge) ** 2
    return VisionShape(
        width, inner, vit.layers, vit.patch_size, outside, small, gated=True, window=seen, unwindowed=whole_layers
    )


def _model(name: str, decoder: DecoderShape) -> ModelShape:
    return ModelShape(name, decoder, vision_shape(_VIT, decoder.hidden_size, 4, 4), PICTURES)


PUBLISHED = (
    _model("qwen2.5-vl-3b", DecoderShape(2048, 11008, 36, 16, 2, 128, 151936, 128000, tied_head=True, qkv_bias=True)),
    _model("qwen2.5-vl-7b", DecoderShape(3584, 18944, 28, 28, 4, 128, 152064, 128000, qkv_bias=True)),
)
