"""The decoder that a config.json describes, of any family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadModel, quoted
from .config_fields import Fields, divides
from .spec import TextSpec

# config.json leaves out what equals the default of its kind, so the defaults are part of the format
# (transformers' configuration classes of the same names).
_TEXT_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN2_VL: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
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
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
    },
    "qwen3_vl_text": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 128000,
        "vocab_size": 151936,
        "rope_theta": 500000.0,
    },
}


_BIASED = frozenset({"qwen2", "qwen2_vl_text", "qwen2_5_vl_text"})
_HEAD_NORMS = frozenset({"qwen3", "qwen3_vl_text"})
_MAY_SLIDE = _BIASED | {"qwen3"}


def read_text(fields: Fields, tied: bool, kind: str | None = None) -> TextSpec:
    """The decoder of a ``text_config``; :class:`BadModel` names the field that is missing or unsupported.

    ``kind``: what it is, whatever the section says; ``tied``: its head is, as the file says elsewhere.
    """
    family = kind or fields.one_of("model_type", tuple(_TEXT_DEFAULTS), "llama")
    fields = fields.with_defaults(_TEXT_COMMON, _TEXT_DEFAULTS[family])
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads") if fields.get("num_key_value_heads") else heads
    divides(fields.name, "num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if fields.get("head_dim") is None:
        divides(fields.name, "num_attention_heads", heads, "hidden_size", hidden)
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
        qkv_bias=family in _BIASED or fields.flag("attention_bias"),
        out_bias=family not in _BIASED and fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        rope=_rope(fields),
        head_norms=family in _HEAD_NORMS,
    )


def _context(fields: Fields, family: str) -> int:
    """The context, cut at a sliding window where the model has one: rows beyond it would need masks per query."""
    context = fields.size("max_position_embeddings")
    if family in _MAY_SLIDE and not fields.flag("use_sliding_window"):
        return context
    # Written as null it means no window; left out, the family's default.
    if fields.values.get("sliding_window", fields.defaults.get("sliding_window")) is None:
        return context
    return min(context, fields.size("sliding_window"))


def _rope(fields: Fields) -> Mapping[str, Any]:
    """RoPE's parameters in one form; older checkpoints keep rope_theta and rope_scaling apart."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise BadModel(f"{fields.name}: rope_scaling must be an object, not {quoted(scaling)}")
    rope = {"rope_theta": fields.get("rope_theta") or 10000.0, **scaling}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    rope["rope_type"] = "default" if kind == "mrope" else kind
    rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return rope
