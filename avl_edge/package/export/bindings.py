"""Names, shapes and dtypes of what goes in and out of the graphs; the package's docstring says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...attention.cuda import FORMATS
from ...config import Formats
from ...kv.layout import can_hold
from ...model.families.llava import LlavaSpec
from ...model.spec import TextSpec

PIXELS, FEATURES = "pixels", "features"
TOKEN_IDS, FEATURE_ROWS, POSITIONS, TOKEN_OFFSETS = "token_ids", "feature_rows", "positions", "token_offsets"
SLOTS, ROWS, ROW_OFFSETS = "slots", "rows", "row_offsets"
SMOOTHING = "smoothing"
SCORE_QUERIES, PINNED, SURVIVORS = "score_queries", "pinned", "survivors"
POOL_KEYS, POOL_VALUES = "pool_keys", "pool_values"
POOL_KEY_WORDS, POOL_VALUE_WORDS = "pool_key_words", "pool_value_words"
LOGITS, ROW_SCORES, KEPT = "logits", "row_scores", "kept"
KEY, VALUE, TOKEN_SCORES = "key.{}", "value.{}", "token_scores.{}"


@dataclass(frozen=True)
class Binding:
    """One input or output; a text in ``shape`` is a dimension that varies."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def shape_at(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the dimensions that vary are ``dims``."""
        return tuple(dim if isinstance(dim, int) else dims[dim] for dim in self.shape)


@dataclass(frozen=True)
class Bindings:
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]


def vision_bindings(spec: LlavaSpec, dtype: str) -> Bindings:
    """Those of ``vision.onnx`` with weights of ``dtype`` (float32, float16 or bfloat16)."""
    side = spec.vision.image_size
    return Bindings(
        (Binding(PIXELS, ("I", 3, side, side), "float32"),),
        (Binding(FEATURES, ("I", spec.tokens_per_image, spec.text.hidden_size), dtype),),
    )


def row_formats(text: TextSpec, dtype: str) -> tuple[str, ...]:
    """The formats that rows may have in the graph of a decoder with weights of ``dtype``, in the order of their parts:
    all of :data:`avl_edge.attention.cuda.FORMATS`, or exact alone where its rows are too small to be packed."""
    shape = text.kv_shape(4 if dtype == "float32" else 2)
    packs = all(can_hold(Formats(name, name, name), shape) for name in FORMATS)
    return tuple(FORMATS) if packs else ("exact",)


def decoder_bindings(spec: LlavaSpec, dtype: str, prune_after: int | None) -> Bindings:
    """Those of ``decoder.onnx``; ``prune_after`` is the layer after which tokens are pruned, None for never."""
    text = spec.text
    layers, row = text.layers, (text.kv_heads, text.head_dim)
    prune, packs = prune_after is not None, len(row_formats(text, dtype)) > 1
    words = (Binding(name, ("U", 4), "int32") for name in (POOL_KEY_WORDS, POOL_VALUE_WORDS))
    inputs = (
        Binding(TOKEN_IDS, ("T",), "int32"),
        Binding(FEATURES, ("F", text.hidden_size), dtype),
        Binding(FEATURE_ROWS, ("T",), "int32"),
        Binding(POSITIONS, ("T",), "int32"),
        Binding(TOKEN_OFFSETS, ("B + 1",), "int32"),
        Binding(SLOTS, (layers, "P * T" if packs else "T"), "int32"),
        Binding(ROWS, (layers, "N"), "int32"),
        Binding(ROW_OFFSETS, (layers, "P * B + 1" if packs else "B + 1"), "int32"),
        *((Binding(SMOOTHING, (layers, "T"), "int32"),) if packs else ()),
        Binding(SCORE_QUERIES, ("W",), "int32"),
        *((Binding(PINNED, ("T",), "int32"), Binding(SURVIVORS, (1,), "int64")) if prune else ()),
        Binding(POOL_KEYS, ("R", *row), dtype),
        Binding(POOL_VALUES, ("R", *row), dtype),
        *(words if packs else ()),
    )
    outputs = [Binding(LOGITS, ("B", text.vocab_size), "float32"), Binding(ROW_SCORES, (layers, 2, "N"), "float32")]
    outputs += [Binding(KEPT, ("M",), "int32")] if prune else []
    for layer in range(layers):
        tokens = "M" if prune_after is not None and layer > prune_after else "T"
        outputs += [
            Binding(KEY.format(layer), (tokens, *row), dtype),
            Binding(VALUE.format(layer), (tokens, *row), dtype),
            Binding(TOKEN_SCORES.format(layer), (2, tokens), "float32"),
        ]
    return Bindings(inputs, tuple(outputs))
