"""The CLIP vision tower that a config.json describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BadModel, quoted
from .config_fields import Fields, divides

# As in `text_config`: what config.json leaves out equals these.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class ClipSpec:
    """A CLIP vision tower: square pictures of ``image_size`` pixels in patches of ``patch_size``."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def read_clip(fields: Fields) -> ClipSpec:
    """The tower of a ``vision_config``; :class:`BadModel` names the field that is unsupported."""
    fields.one_of("model_type", ("clip_vision_model",), "clip_vision_model")
    fields = fields.with_defaults(_DEFAULTS)
    spec = ClipSpec(
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        layers=fields.size("num_hidden_layers"),
        heads=fields.size("num_attention_heads"),
        image_size=fields.size("image_size"),
        patch_size=fields.size("patch_size"),
        activation=fields.text("hidden_act"),
        norm_eps=fields.number("layer_norm_eps"),
    )
    divides(fields.name, "num_attention_heads", spec.heads, "hidden_size", spec.hidden_size)
    if spec.patch_size > spec.image_size:
        raise BadModel(f"{fields.name}: patch_size {spec.patch_size} is larger than image_size {spec.image_size}")
    return spec


def read_feature_layers(value: Any, layers: int) -> tuple[int, ...]:
    """``vision_feature_layer``, of a tower of so many ``layers``, as indices of its hidden states (0: after the
    embedding)."""
    chosen = value if isinstance(value, list) and value else [value]
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -layers - 1 <= layer <= layers:
            raise BadModel(f"config.json: vision_feature_layer {quoted(value)} is outside a tower of {layers} layers")
    return tuple(layer % (layers + 1) for layer in chosen)
