"""What a Qwen3-VL checkpoint is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....errors import BadModel, quoted
from ...config_fields import Fields
from ...sizes import VisionShape
from ..qwen2_vl.pictures import FRAMES, read_limits
from ..qwen2_vl.spec import QwenSpec, image_token, read_mrope_text, read_vit
from .published import MAX_PIXELS, MIN_PIXELS, vision_shape

_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": FRAMES,
    "num_position_embeddings": 2304,
}
_DEEP = [8, 16, 24]


@dataclass(frozen=True)
class Qwen3VlSpec(QwenSpec):
    """A Qwen3-VL checkpoint. ``positions``: learned ones along the edge of a square; ``deep_layers``: those of the
    tower whose outputs the decoder's first layers get."""

    codec: ClassVar[str] = f"{__package__}.codec"
    network: ClassVar[str] = f"{__package__}.network"

    positions: int
    deep_layers: tuple[int, ...]

    @property
    def vision_shape(self) -> VisionShape:
        return vision_shape(self.vision, self.text.hidden_size, self.positions, len(self.deep_layers))


def read(config: Fields, directory: Path) -> Qwen3VlSpec:
    """The spec of a config.json."""
    vision = config.section("vision_config").with_defaults(_VISION_DEFAULTS)
    vit = read_vit(vision, vision.size("hidden_size"), vision.size("intermediate_size"))
    text = read_mrope_text(config, "qwen3_vl_text", [24, 20, 20], interleaved=True)
    deep = vision.values.get("deepstack_visual_indexes", _DEEP)
    ascending = isinstance(deep, list) and all(type(each) is int for each in deep) and deep == sorted(set(deep))
    if not ascending or any(not 0 <= each < vit.layers for each in deep) or len(deep) >= text.layers:
        raise BadModel(
            f"{vision.name}: deepstack_visual_indexes must be layers of the tower, ascending and fewer than the "
            f"decoder's, not {quoted(deep)}"
        )
    count = vision.size("num_position_embeddings")
    if math.isqrt(count) ** 2 != count:
        raise BadModel(f"{vision.name}: num_position_embeddings {count} is no square")
    least, most = read_limits(directory, MIN_PIXELS, MAX_PIXELS)
    return Qwen3VlSpec(text, image_token(config), vit, least, most, math.isqrt(count), tuple(deep))
