"""What a Qwen2-VL checkpoint is, and what all Qwens have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ....config import Picture
from ....errors import BadModel, quoted
from ...config_fields import Fields, divides
from ...sizes import VisionShape
from ...spec import ModelSpec, TextSpec
from ...text_config import read_text
from .pictures import FRAMES, Merged, read_limits
from .published import MAX_PIXELS, MIN_PIXELS, vision_shape
from .vit_spec import PatchVitSpec

_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": FRAMES,
}


@dataclass(frozen=True)
class QwenSpec(ModelSpec):
    """A Qwen that sees. ``min_pixels`` and ``max_pixels``: the range to which pictures are resized."""

    codec: ClassVar[str] = f"{__package__}.codec"
    prefixes: ClassVar[Mapping[str, str]] = {
        "model.visual.": "vision.",
        "visual.": "vision.",
        "model.layers.": "text.layers.",
        "model.embed_tokens.": "text.embed_tokens.",
        "model.norm.": "text.norm.",
    }

    vision: PatchVitSpec
    min_pixels: int
    max_pixels: int

    @property
    def ticks(self) -> float | None:
        """Coordinates of time in a second of a video; None: one for each two frames."""
        return None

    @property
    def picture(self) -> Merged:
        return Merged(self.vision.patch_size, self.min_pixels, self.max_pixels, self.vision.merge)

    def pixel_bytes(self, picture: Picture) -> int:
        return 4 * picture.patches * self.vision.patch_values


@dataclass(frozen=True)
class Qwen2VlSpec(QwenSpec):
    """A Qwen2-VL checkpoint."""

    network: ClassVar[str] = f"{__package__}.network"

    @property
    def vision_shape(self) -> VisionShape:
        return vision_shape(self.vision, self.text.hidden_size)


def read(config: Fields, directory: Path) -> Qwen2VlSpec:
    """The spec of a config.json."""
    vision = config.section("vision_config").with_defaults(_VISION_DEFAULTS)
    size = vision.size("embed_dim")
    vit = read_vit(vision, size, int(vision.number("mlp_ratio") * size))
    least, most = read_limits(directory, MIN_PIXELS, MAX_PIXELS)
    text = read_mrope_text(config, "qwen2_vl_text", [16, 24, 24])
    return Qwen2VlSpec(text, image_token(config), vit, least, most)


def read_vit(fields: Fields, hidden_size: int, intermediate_size: int) -> PatchVitSpec:
    """The sizes of a ``vision_config`` that all Qwens have."""
    for key, value in (("in_channels", 3), ("temporal_patch_size", FRAMES)):
        if fields.get(key) != value:
            raise BadModel(f"{fields.name}: {key} {quoted(fields.get(key))} is not supported: it must be {value}")
    heads = fields.size("num_heads")
    divides(fields.name, "4 * num_heads", 4 * heads, "the hidden size", hidden_size)
    rope = fields.get("rope_parameters")
    theta = rope.get("rope_theta", 10000.0) if isinstance(rope, dict) else 10000.0
    return PatchVitSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layers=fields.size("depth"),
        heads=heads,
        patch_size=fields.size("patch_size"),
        merge=fields.size("spatial_merge_size"),
        activation=fields.text("hidden_act"),
        theta=Fields({"rope_theta": theta}, {}, fields.name).number("rope_theta"),
    )


def read_mrope_text(config: Fields, kind: str, sections: list[int], *, interleaved: bool = False) -> TextSpec:
    """The decoder, in a section of its own or, as older files have it, beside the others'; ``sections`` of M-RoPE where
    the file does not say."""
    tied = config.flag("tie_word_embeddings")
    text = read_text(config.section("text_config") if "text_config" in config.values else config, tied, kind)
    rope = {"mrope_section": sections, **text.rope, "mrope_interleaved": interleaved}
    found = rope["mrope_section"]
    sound = isinstance(found, list) and len(found) == 3 and all(type(each) is int and each >= 0 for each in found)
    if not sound or 2 * sum(found) != text.head_dim:
        raise BadModel(
            f"config.json: mrope_section must be 3 numbers with the sum {text.head_dim // 2}, not {quoted(found)}"
        )
    return replace(text, rope=rope)


def image_token(config: Fields) -> int:
    """The id of the placeholder."""
    return config.with_defaults({"image_token_id": 151655}).size("image_token_id")
