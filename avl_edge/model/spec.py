"""What a LLaVA checkpoint is, read from its config.json: sizes and kinds, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import KvShape, read_json
from ..errors import BadModel, quoted
from .pictures import Fixed

# config.json leaves out what equals the family's default, so the defaults are part of the format
# (transformers' configuration classes of the same names).
_LLAVA_DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048, "vocab_size": 32000},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 32000,
        "sliding_window": 4096,
    },
    "qwen2": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
    },
}

# What no model has more of. A larger number is a damaged file, or one that is meant to exhaust memory.
_MOST = {
    "num_hidden_layers": 1 << 10,
    "image_size": 1 << 12,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}
_MOST_OF_OTHERS = 1 << 22
_MOST_NUMBER = 1e30


@dataclass(frozen=True)
class VisionSpec:
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


@dataclass(frozen=True)
class TextSpec:
    """A decoder of the LLaMA family. ``context`` is the longest sequence in tokens, prompt and answer."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    vocab_size: int
    context: int
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: Mapping[str, Any]

    def kv_shape(self, itemsize: int) -> KvShape:
        """The row shape for elements of ``itemsize`` bytes."""
        return KvShape(self.layers, self.kv_heads, self.head_dim, itemsize)


@dataclass(frozen=True)
class ModelSpec:
    """A LLaVA-1.5 checkpoint. ``feature_layers`` index the vision tower's hidden states (0: after the embedding)."""

    vision: VisionSpec
    text: TextSpec
    image_token_id: int
    feature_layers: tuple[int, ...]
    drop_class_token: bool
    projector_activation: str
    projector_bias: bool

    @property
    def picture(self) -> Fixed:
        """From a picture to patches and tokens."""
        return Fixed.clip(self.vision.patches, drop_class_token=self.drop_class_token)

    @property
    def tokens_per_image(self) -> int:
        return self.picture.tokens


def read_spec(directory: Path) -> ModelSpec:
    """The spec in ``directory/config.json``; :class:`BadModel` names the field that is missing or unsupported."""
    config = read_json(directory / "config.json")
    if config is None:
        raise BadModel(f"{directory} has no config.json: give the directory of a complete checkpoint")
    kind = config.get("model_type")
    if kind != "llava":
        raise BadModel(f"{directory}/config.json has model_type {quoted(kind)}: only 'llava' (LLaVA-1.5) is supported")
    fields = _Fields(config, _LLAVA_DEFAULTS, "config.json")
    vision = _vision(fields.section("vision_config"))
    strategy = fields.one_of("vision_feature_select_strategy", ("default", "full"), "default")
    tied = fields.flag("tie_word_embeddings")
    return ModelSpec(
        vision=vision,
        text=_text(fields.section("text_config"), tied),
        image_token_id=fields.size("image_token_id" if "image_token_id" in config else "image_token_index"),
        feature_layers=_feature_layers(config.get("vision_feature_layer", -2), vision.layers),
        drop_class_token=strategy == "default",
        projector_activation=fields.text("projector_hidden_act"),
        projector_bias=fields.flag("multimodal_projector_bias"),
    )


class _Fields:
    """One section of config.json, with its defaults and its name for messages."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> None:
        self.values, self.defaults, self.name = values, defaults, name

    def section(self, key: str) -> _Fields:
        if not isinstance(self.values.get(key), dict):
            raise BadModel(f"{self.name} has no {key}: it must be the section that describes that part of the model")
        return _Fields(self.values[key], {}, f"{self.name}, {key}")

    def with_defaults(self, *defaults: Mapping[str, Any]) -> _Fields:
        return _Fields(self.values, {key: value for part in defaults for key, value in part.items()}, self.name)

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def size(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(f"{self.name}: {key} must be a positive whole number, not {quoted(value)}")
        most = _MOST.get(key, _MOST_OF_OTHERS)
        if value > most:
            raise BadModel(f"{self.name}: {key} is {quoted(value)}, and no model has more than {most}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _MOST_NUMBER:
            raise BadModel(f"{self.name}: {key} must be a positive number, not {quoted(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise BadModel(f"{self.name}: {key} must be true or false, not {quoted(value)}")
        return bool(value)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise BadModel(f"{self.name}: {key} must be a string, not {quoted(value)}")
        return value

    def one_of(self, key: str, known: tuple[str, ...], default: str) -> str:
        value = self.values.get(key, default)
        if value not in known:
            raise BadModel(f"{self.name}: {key} {quoted(value)} is not supported: it must be one of {', '.join(known)}")
        return str(value)


def _vision(fields: _Fields) -> VisionSpec:
    fields.one_of("model_type", ("clip_vision_model",), "clip_vision_model")
    fields = fields.with_defaults(_VISION_DEFAULTS)
    spec = VisionSpec(
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        layers=fields.size("num_hidden_layers"),
        heads=fields.size("num_attention_heads"),
        image_size=fields.size("image_size"),
        patch_size=fields.size("patch_size"),
        activation=fields.text("hidden_act"),
        norm_eps=fields.number("layer_norm_eps"),
    )
    _divides(fields.name, "num_attention_heads", spec.heads, "hidden_size", spec.hidden_size)
    if spec.patch_size > spec.image_size:
        raise BadModel(f"{fields.name}: patch_size {spec.patch_size} is larger than image_size {spec.image_size}")
    return spec


def _text(fields: _Fields, tied: bool) -> TextSpec:
    family = fields.one_of("model_type", tuple(_TEXT_DEFAULTS), "llama")
    fields = fields.with_defaults(_TEXT_COMMON, _TEXT_DEFAULTS[family])
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads") if fields.get("num_key_value_heads") else heads
    _divides(fields.name, "num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if fields.get("head_dim") is None:
        _divides(fields.name, "num_attention_heads", heads, "hidden_size", hidden)
    return TextSpec(
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        layers=fields.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.size("head_dim") if fields.get("head_dim") else hidden // heads,
        activation=fields.text("hidden_act"),
        norm_eps=fields.number("rms_norm_eps"),
        vocab_size=fields.size("vocab_size"),
        context=_context(fields, family),
        tied_head=tied or fields.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or fields.flag("attention_bias"),
        out_bias=family != "qwen2" and fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        rope=_rope(fields),
    )


def _context(fields: _Fields, family: str) -> int:
    """The context, cut at a sliding window where the model has one: rows beyond it would need masks per query."""
    context = fields.size("max_position_embeddings")
    if family == "qwen2" and not fields.flag("use_sliding_window"):
        return context
    # Written as null it means no window; left out, the family's default.
    if fields.values.get("sliding_window", fields.defaults.get("sliding_window")) is None:
        return context
    return min(context, fields.size("sliding_window"))


def _rope(fields: _Fields) -> Mapping[str, Any]:
    """RoPE's parameters in one form; older checkpoints keep rope_theta and rope_scaling apart."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise BadModel(f"{fields.name}: rope_scaling must be an object, not {quoted(scaling)}")
    rope = {"rope_theta": fields.get("rope_theta") or 10000.0, **scaling}
    rope["rope_type"] = str(scaling.get("rope_type") or scaling.get("type") or "default")
    rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return rope


def _feature_layers(value: Any, layers: int) -> tuple[int, ...]:
    chosen = value if isinstance(value, list) and value else [value]
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -layers - 1 <= layer <= layers:
            raise BadModel(f"config.json: vision_feature_layer {quoted(value)} is outside a tower of {layers} layers")
    return tuple(layer % (layers + 1) for layer in chosen)


def _divides(name: str, divisor_name: str, divisor: int, whole_name: str, whole: int) -> None:
    if whole % divisor:
        raise BadModel(f"{name}: {whole_name} {whole} is not a multiple of {divisor_name} {divisor}")
