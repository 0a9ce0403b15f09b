"""What a Qwen-VL checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....config import Picture
from ....errors import BadModel, quoted
from ...config_fields import Fields, divides
from ...pictures import Fixed
from ...sizes import VisionShape
from ...spec import ModelSpec, TextSpec
from .published import QUERIES, vision_shape

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "vocab_size": 151936,
    "no_bias": True,
}
_HEAD = 128
"""Of the resampler, whatever the config says."""
_PAD = 2
"""From the token that opens a picture to its placeholder."""


@dataclass(frozen=True)
class QwenVlSpec(ModelSpec):
    """A Qwen-VL checkpoint: a tower over ``image_size`` pixels along an edge, with so many ``positions`` along one that
    are learned, and a resampler."""

    codec: ClassVar[str] = f"{__package__}.codec"
    network: ClassVar[str] = f"{__package__}.network"
    prefixes: ClassVar[Mapping[str, str]] = {
        "transformer.visual.": "vision.",
        "transformer.wte.": "text.embed_tokens.",
        "transformer.ln_f.": "text.norm.",
        "transformer.h.": "text.layers.",
    }
    has_own_names: ClassVar[bool] = True

    width: int
    inner: int
    layers: int
    heads: int
    patch_size: int
    image_size: int

    @property
    def patches(self) -> int:
        """Along an edge."""
        return self.image_size // self.patch_size

    @property
    def resampler_heads(self) -> int:
        return self.text.hidden_size // _HEAD

    @property
    def picture(self) -> Fixed:
        return Fixed(self.patches**2, QUERIES)

    def pixel_bytes(self, picture: Picture) -> int:  # noqa: ARG002
        return 4 * 3 * self.image_size**2

    @property
    def vision_shape(self) -> VisionShape:
        return vision_shape(self.width, self.inner, self.layers, self.patch_size, self.text.hidden_size)


def read(config: Fields, directory: Path) -> QwenVlSpec:  # noqa: ARG001
    """The spec of a config.json."""
    text = _read_text(config.with_defaults(_DEFAULTS))
    vision = config.section("visual")
    width, size, patch = vision.size("width"), vision.size("image_size"), vision.size("patch_size")
    divides(vision.name, "heads", vision.size("heads"), "width", width)
    divides(vision.name, "patch_size", patch, "image_size", size)
    divides(vision.name, "a resampler's head", _HEAD, "output_dim", vision.size("output_dim"))
    if vision.size("output_dim") != text.hidden_size:
        raise BadModel(f"{vision.name}: output_dim {vision.size('output_dim')} is not hidden_size, {text.hidden_size}")
    if vision.get("n_queries") not in (None, QUERIES):
        raise BadModel(f"{vision.name}: n_queries {quoted(vision.get('n_queries'))} is not supported: it is {QUERIES}")
    return QwenVlSpec(
        text,
        image_token_id=vision.size("image_start_id") + _PAD,
        width=width,
        inner=int(width * vision.number("mlp_ratio")),
        layers=vision.size("layers"),
        heads=vision.size("heads"),
        patch_size=patch,
        image_size=size,
    )


def _read_text(config: Fields) -> TextSpec:
    heads = config.size("num_attention_heads")
    if heads * config.size("kv_channels") != config.size("hidden_size"):
        raise BadModel(f"{config.name}: kv_channels times num_attention_heads must be hidden_size")
    for key, value in (("no_bias", True), ("rotary_pct", 1.0)):
        if config.get(key) != value:
            raise BadModel(f"{config.name}: {key} {quoted(config.get(key))} is not supported: it must be {value}")
    return TextSpec(
        hidden_size=config.size("hidden_size"),
        intermediate_size=config.size("intermediate_size") // 2,  # of both matrices together
        layers=config.size("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=config.size("kv_channels"),
        activation="silu",
        norm_eps=config.number("layer_norm_epsilon"),
        vocab_size=config.size("vocab_size"),
        context=min(config.size("seq_length"), config.size("max_position_embeddings")),
        tied_head=config.flag("tie_word_embeddings"),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        rope={"rope_type": "default", "rope_theta": config.number("rotary_emb_base")},
    )
