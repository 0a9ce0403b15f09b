"""What a Qwen2.5-VL checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....errors import BadModel, quoted
from ...config_fields import Fields
from ...sizes import VisionShape
from ..qwen2_vl.pictures import FRAMES, read_limits
from ..qwen2_vl.published import MAX_PIXELS, MIN_PIXELS
from ..qwen2_vl.spec import QwenSpec, image_token, read_mrope_text, read_vit
from .published import vision_shape

_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": FRAMES,
    "window_size": 112,
    "tokens_per_second": 4,
}
_WHOLE = [7, 15, 23, 31]


@dataclass(frozen=True)
class Qwen25VlSpec(QwenSpec):
    """A Qwen2.5-VL checkpoint. ``window``: tokens along the edge of a window; ``whole_layers`` have none;
    ``tokens_per_second``: of a video's, coordinates of time."""

    network: ClassVar[str] = f"{__package__}.network"

    window: int
    whole_layers: frozenset[int]
    tokens_per_second: float

    @property
    def ticks(self) -> float:
        return self.tokens_per_second

    @property
    def vision_shape(self) -> VisionShape:
        return vision_shape(self.vision, self.text.hidden_size, self.window, len(self.whole_layers))


def read(config: Fields, directory: Path) -> Qwen25VlSpec:
    """The spec of a config.json."""
    vision = config.section("vision_config").with_defaults(_VISION_DEFAULTS)
    vit = read_vit(vision, vision.size("hidden_size"), vision.size("intermediate_size"))
    window = vision.size("window_size") // vit.merge // vit.patch_size
    if window < 1:
        raise BadModel(f"{vision.name}: window_size {vision.get('window_size')} is smaller than a token")
    whole = vision.values.get("fullatt_block_indexes", _WHOLE)
    if not isinstance(whole, list) or any(type(each) is not int or not 0 <= each < 1 << 10 for each in whole):
        raise BadModel(f"{vision.name}: fullatt_block_indexes must be a list of layers, not {quoted(whole)}")
    least, most = read_limits(directory, MIN_PIXELS, MAX_PIXELS)
    text = read_mrope_text(config, "qwen2_5_vl_text", [16, 24, 24])
    layers = frozenset(each for each in whole if each < vit.layers)
    return Qwen25VlSpec(text, image_token(config), vit, least, most, window, layers, vision.number("tokens_per_second"))
