"""What a LLaVA-1.5 checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....config import Picture
from ...clip_config import ClipSpec, read_clip, read_feature_layers
from ...config_fields import Fields
from ...pictures import Fixed
from ...sizes import VisionShape
from ...spec import ModelSpec
from ...text_config import read_text
from .published import vision_shape

# What config.json leaves out equals these (transformers' LlavaConfig).
DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ClipModelSpec(ModelSpec):
    """CLIP, a projector of two layers and a decoder.

    ``feature_layers`` index the vision tower's hidden states (0: after the embedding).
    """

    vision: ClipSpec
    feature_layers: tuple[int, ...]
    drop_class_token: bool
    projector_activation: str
    projector_bias: bool

    def pixel_bytes(self, picture: Picture) -> int:
        return 4 * picture.crops * 3 * self.vision.image_size**2

    @property
    def vision_shape(self) -> VisionShape:
        features = len(self.feature_layers)
        # A projector that takes several layers' features has one wider matrix.
        wider = (features - 1) * self.vision.hidden_size * self.text.hidden_size
        return vision_shape(
            self.vision.hidden_size,
            self.vision.intermediate_size,
            self.vision.layers,
            self.vision.patches + 1,
            self.vision.patch_size,
            self.text.hidden_size,
            max(self.feature_layers),
            wider,
        )


@dataclass(frozen=True)
class LlavaSpec(ClipModelSpec):
    """A LLaVA-1.5 checkpoint."""

    codec: ClassVar[str] = f"{__package__}.codec"
    network: ClassVar[str] = f"{__package__}.network"

    @property
    def picture(self) -> Fixed:
        return Fixed.clip(self.vision.patches, drop_class_token=self.drop_class_token)

    @property
    def tokens_per_image(self) -> int:
        return self.picture.tokens


def read(config: Fields, directory: Path) -> LlavaSpec:  # noqa: ARG001
    """The spec of a config.json."""
    return LlavaSpec(**read_fields(config.with_defaults(DEFAULTS)))


def read_fields(config: Fields) -> dict[str, Any]:
    """The fields of a :class:`ClipModelSpec`."""
    vision = read_clip(config.section("vision_config"))
    strategy = config.one_of("vision_feature_select_strategy", ("default", "full"), "default")
    tied = config.flag("tie_word_embeddings")
    return {
        "vision": vision,
        "text": read_text(config.section("text_config"), tied),
        "image_token_id": config.size("image_token_id" if "image_token_id" in config.values else "image_token_index"),
        "feature_layers": read_feature_layers(config.values.get("vision_feature_layer", -2), vision.layers),
        "drop_class_token": strategy == "default",
        "projector_activation": config.text("projector_hidden_act"),
        "projector_bias": config.flag("multimodal_projector_bias"),
    }
