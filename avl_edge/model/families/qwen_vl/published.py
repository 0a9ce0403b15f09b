"""The published Qwen-VL, by the sizes in its config.json file."""

from __future__ import annotations

from ...pictures import Fixed
from ...sizes import DecoderShape, ModelShape, VisionShape

QUERIES = 256
"""Of the resampler: a picture's tokens."""


def vision_shape(width: int, inner: int, layers: int, patch: int, hidden: int, positions: int = QUERIES) -> VisionShape:
    """A tower whose learned ``positions`` are stretched to its patches, and a cross-attention that brings them to the
    decoder's width: queries with their positions, the projection of what they read, four matrices, three norms, a last
    matrix."""
    resampler = (2 * QUERIES + width + 4 * (hidden + 1) + 6 + hidden) * hidden
    outside = width * (3 * patch**2 + positions + 2) + resampler
    return VisionShape(width, inner, layers, patch, outside=outside, layer_small=4 * width + inner + width + 4 * width)


PUBLISHED = (
    ModelShape(
        "qwen-vl",
        DecoderShape(4096, 11008, 32, 32, 32, 128, 151936, 2048, qkv_bias=True),
        vision_shape(1664, 8192, 48, 14, 4096),
        Fixed(patches=1024, tokens=QUERIES),
    ),
)
