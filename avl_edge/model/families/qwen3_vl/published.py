"""The published models of Qwen3-VL's form, by the sizes in their config.json files."""

from __future__ import annotations

from ...sizes import DecoderShape, ModelShape, VisionShape
from ..qwen2_vl.pictures import Merged
from ..qwen2_vl.published import merger_parameters
from ..qwen2_vl.vit_spec import PatchVitSpec

MIN_PIXELS, MAX_PIXELS = 256 * 256, 4096 * 4096
"""The range of pixels that the published checkpoints have."""

_SMALL = PatchVitSpec(1024, 4096, 24, 16, 16, 2, "gelu_pytorch_tanh")
_LARGE = PatchVitSpec(1152, 4304, 27, 16, 16, 2, "gelu_pytorch_tanh")
_2B = DecoderShape(2048, 6144, 28, 16, 8, 128, 151936, 262144, tied_head=True, head_norms=True)
_4B = DecoderShape(2560, 9728, 36, 32, 8, 128, 151936, 262144, tied_head=True, head_norms=True)
_8B = DecoderShape(4096, 12288, 36, 32, 8, 128, 151936, 262144, head_norms=True)


def vision_shape(vit: PatchVitSpec, hidden: int, positions: int, deep: int) -> VisionShape:
    """The tower with ``positions`` x ``positions`` learned ones, the merger, which gives ``hidden`` features, and
    ``deep`` others, which norm after merging."""
    width, inner = vit.hidden_size, vit.intermediate_size
    mergers = (1 + deep) * merger_parameters(vit, hidden) + 2 * width * (1 + deep * vit.merge**2)
    outside = vit.patch_values * width + width + positions**2 * width + mergers
    small = 4 * width + inner + width + 4 * width
    return VisionShape(width, inner, vit.layers, vit.patch_size, outside, small, deep=deep)


def _model(name: str, decoder: DecoderShape, vit: PatchVitSpec) -> ModelShape:
    pictures = Merged(vit.patch_size, MIN_PIXELS, MAX_PIXELS, vit.merge)
    return ModelShape(name, decoder, vision_shape(vit, decoder.hidden_size, 48, 3), pictures)


PUBLISHED = (
    _model("qwen3-vl-2b", _2B, _SMALL),
    _model("qwen3-vl-4b", _4B, _SMALL),
    _model("qwen3-vl-8b", _8B, _LARGE),
    _model("cosmos-reason2-2b", _2B, _SMALL),
    _model("cosmos-reason2-8b", _8B, _LARGE),
)
