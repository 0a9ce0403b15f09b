"""What an InternVL checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ....config import Picture
from ....errors import BadModel, quoted
from ...config_fields import Fields, divides
from ...sizes import VisionShape
from ...spec import ModelSpec
from ...text_config import read_text
from .pictures import Tiled, read_tile_counts
from .published import vision_shape
from .vit_spec import InternVitSpec

_DEFAULTS: dict[str, Any] = {
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "tie_word_embeddings": True,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}


@dataclass(frozen=True)
class InternVlSpec(ModelSpec):
    """An InternVL checkpoint. ``feature_layer``: so many layers of the tower run; ``merge`` x ``merge`` patches become
    a token; from ``least_tiles`` to ``most_tiles`` of a picture."""

    codec: ClassVar[str] = f"{__package__}.codec"
    network: ClassVar[str] = f"{__package__}.network"

    vision: InternVitSpec
    feature_layer: int
    merge: int
    projector_activation: str
    least_tiles: int
    most_tiles: int

    @property
    def picture(self) -> Tiled:
        side = self.vision.side
        return Tiled(self.vision.image_size, 1 + side**2, (side // self.merge) ** 2, self.least_tiles, self.most_tiles)

    @property
    def vision_shape(self) -> VisionShape:
        return vision_shape(self.vision, self.merge, self.text.hidden_size, self.feature_layer)

    def pixel_bytes(self, picture: Picture) -> int:
        return 4 * picture.crops * 3 * self.vision.image_size**2


def read(config: Fields, directory: Path) -> InternVlSpec:
    """The spec of a config.json."""
    config = config.with_defaults(_DEFAULTS)
    config.one_of("vision_feature_select_strategy", ("default",), "default")  # tiles with class tokens make no square
    vision = _read_vit(config.section("vision_config"))
    layer = config.get("vision_feature_layer")
    if type(layer) is not int or not -vision.layers - 1 <= layer <= vision.layers:
        raise BadModel(f"config.json: vision_feature_layer {quoted(layer)} is no layer of a tower of {vision.layers}")
    ratio = config.number("downsample_ratio")
    merge = round(1 / ratio)
    if not 1 <= merge <= vision.side or merge * ratio != 1 or vision.side % merge:
        raise BadModel(f"config.json: downsample_ratio {ratio:g} does not divide {vision.side} patches")
    least, most = read_tile_counts(directory)
    return InternVlSpec(
        text=read_text(config.section("text_config"), config.flag("tie_word_embeddings")),
        image_token_id=config.size("image_token_id"),
        vision=vision if layer == -1 else replace(vision, last_norm=False),
        feature_layer=layer % (vision.layers + 1),
        merge=merge,
        projector_activation=config.text("projector_hidden_act"),
        least_tiles=least,
        most_tiles=most,
    )


def _read_vit(fields: Fields) -> InternVitSpec:
    fields = fields.with_defaults(_VISION_DEFAULTS)
    if not fields.flag("use_absolute_position_embeddings"):
        raise BadModel(f"{fields.name}: use_absolute_position_embeddings must be true")
    spec = InternVitSpec(
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        layers=fields.size("num_hidden_layers"),
        heads=fields.size("num_attention_heads"),
        image_size=_edge(fields, "image_size"),
        patch_size=_edge(fields, "patch_size"),
        activation=fields.text("hidden_act"),
        norm_eps=fields.number("layer_norm_eps"),
        qkv_bias=fields.flag("attention_bias"),
        head_norms=fields.flag("use_qk_norm"),
        rms=fields.one_of("norm_type", ("layer_norm", "rms_norm"), "layer_norm") == "rms_norm",
        last_norm=not fields.flag("use_mean_pooling"),
    )
    divides(fields.name, "num_attention_heads", spec.heads, "hidden_size", spec.hidden_size)
    divides(fields.name, "patch_size", spec.patch_size, "image_size", spec.image_size)
    return spec


def _edge(fields: Fields, key: str) -> int:
    """An edge in pixels, which may be written as two equal ones."""
    value = fields.get(key)
    edges = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if edges[0] != edges[1]:
        raise BadModel(f"{fields.name}: {key} must be that of a square, not {quoted(value)}")
    return Fields({key: edges[0]}, {}, fields.name).size(key)
