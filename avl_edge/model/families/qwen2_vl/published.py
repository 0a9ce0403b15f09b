"""The published Qwen2-VL models, by the sizes in their config.json files."""

from __future__ import annotations

from ...sizes import DecoderShape, ModelShape, VisionShape
from .pictures import Merged
from .vit_spec import PatchVitSpec

MIN_PIXELS, MAX_PIXELS = 56 * 56, 16384 * 28 * 28
"""The range of pixels that the published checkpoints of 14-pixel patches have."""

PICTURES = Merged(patch=14, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
_VIT = PatchVitSpec(1280, 5120, 32, 16, 14, 2, "quick_gelu")


def vision_shape(vit: PatchVitSpec, hidden: int) -> VisionShape:
    """The tower and the merger, which gives ``hidden`` features."""
    width, inner = vit.hidden_size, vit.intermediate_size
    outside = vit.patch_values * width + 2 * width + merger_parameters(vit, hidden)
    return VisionShape(width, inner, vit.layers, vit.patch_size, outside, 4 * width + inner + width + 4 * width)


def merger_parameters(vit: PatchVitSpec, hidden: int) -> int:
    """Of a merger's two matrices with their biases."""
    width = vit.merge**2 * vit.hidden_size
    return width * width + width + width * hidden + hidden


def _model(name: str, decoder: DecoderShape) -> ModelShape:
    return ModelShape(name, decoder, vision_shape(_VIT, decoder.hidden_size), PICTURES)


PUBLISHED = (
    _model("qwen2-vl-2b", DecoderShape(1536, 8960, 28, 12, 2, 128, 151936, 32768, tied_head=True, qkv_bias=True)),
    _model("qwen2-vl-7b", DecoderShape(3584, 18944, 28, 28, 4, 128, 152064, 32768, qkv_bias=True)),
)
