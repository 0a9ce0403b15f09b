"""The published InternVL3.5 models, by the sizes in their config.json files."""

from __future__ import annotations

from ...sizes import DecoderShape, ModelShape, VisionShape
from .pictures import Tiled
from .vit_spec import InternVitSpec

_VIT = InternVitSpec(
    1024, 4096, 24, 16, 448, 14, "gelu", 1e-6, qkv_bias=True, head_norms=False, rms=False, last_norm=False
)


def vision_shape(vit: InternVitSpec, merge: int, hidden: int, runs: int) -> VisionShape:
    """The tower, of which so many layers run, and the projector, which gives ``hidden`` features."""
    width, inner, merged = vit.hidden_size, vit.intermediate_size, merge**2 * vit.hidden_size
    norm = width if vit.rms else 2 * width
    small = 2 * norm + 3 * width * vit.qkv_bias + 2 * width * vit.head_norms + width + inner + width + 2 * width
    embeddings = width * (1 + 3 * vit.patch_size**2 + 1 + 1 + vit.side**2)
    projector = 2 * merged + merged * hidden + hidden + hidden * hidden + hidden
    outside = embeddings + 2 * width * vit.last_norm + projector
    return VisionShape(width, inner, vit.layers, vit.patch_size, outside, small, runs=runs)


def _model(name: str, hidden: int, inner: int, layers: int, heads: int) -> ModelShape:
    decoder = DecoderShape(hidden, inner, layers, heads, 8, 128, 151936, 40960, head_norms=True)
    return ModelShape(name, decoder, vision_shape(_VIT, 2, hidden, _VIT.layers), Tiled(448, 1 + 32**2, 256))


PUBLISHED = (
    _model("internvl3.5-1b", 1024, 3072, 28, 16),
    _model("internvl3.5-2b", 2048, 6144, 28, 16),
    _model("internvl3.5-4b", 2560, 9728, 36, 32),
    _model("internvl3.5-8b", 4096, 12288, 36, 32),
    _model("internvl3.5-14b", 5120, 17408, 40, 40),
)
