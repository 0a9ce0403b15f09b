"""The published models by name, and any checkpoint of a known family by its config.json.

Sizes are those of the models' config.json files.
"""

from __future__ import annotations

from pathlib import Path

from ..config import read_json
from ..errors import BadModel, quoted
from .families import published, read_spec
from .pictures import Fixed, Merged
from .sizes import DecoderShape, ModelShape, VisionShape
from .spec import ModelSpec


def _qwen2(hidden: int) -> VisionShape:
    merger = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * hidden + hidden
    return VisionShape(1280, 5120, 32, 14, 6 * 14**2 * 1280 + merger, 4 * 1280 + 5120 + 1280 + 4 * 1280)


def _qwen25(hidden: int) -> VisionShape:
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * hidden + hidden
    small = 4 * 1280 + 2 * 3420 + 1280 + 2 * 1280
    outside = 6 * 14**2 * 1280 + merger
    return VisionShape(1280, 3420, 32, 14, outside, small, gated=True, window=64, unwindowed=4)


def _qwen3(width: int, inner: int, layers: int, hidden: int) -> VisionShape:
    """With DeepStack's three further mergers, which norm after merging."""
    linears = 16 * width**2 + 4 * width + 4 * width * hidden + hidden
    outside = 6 * 16**2 * width + width + 2304 * width + (linears + 2 * width) + 3 * (linears + 8 * width)
    return VisionShape(width, inner, layers, 16, outside, 4 * width + inner + width + 4 * width)


# ViT-bigG, whose 256 positions are stretched to 1024 patches, and a cross-attention that brings them to the decoder's
# width: 256 queries with their positions, the projection of what they read, four matrices, three norms, a last matrix.
_QWEN_VL_VISION = VisionShape(
    1664,
    8192,
    48,
    14,
    outside=1664 * (3 * 14**2 + 256 + 2) + (2 * 256 + 1664 + 4 * (4096 + 1) + 6 + 4096) * 4096,
    layer_small=4 * 1664 + 8192 + 1664 + 4 * 1664,
)


_QWEN2_PICTURES = Merged(patch=14, min_pixels=56 * 56, max_pixels=16384 * 28 * 28)
_QWEN3_PICTURES = Merged(patch=16, min_pixels=256 * 256, max_pixels=4096 * 4096)

KNOWN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        *published(),
        ModelShape(
            "qwen-vl",
            DecoderShape(4096, 11008, 32, 32, 32, 128, 151936, 8192, qkv_bias=True),
            _QWEN_VL_VISION,
            Fixed(patches=1024, tokens=256),
        ),
        ModelShape(
            "qwen2-vl-2b",
            DecoderShape(1536, 8960, 28, 12, 2, 128, 151936, 32768, tied_head=True, qkv_bias=True),
            _qwen2(1536),
            _QWEN2_PICTURES,
        ),
        ModelShape(
            "qwen2-vl-7b",
            DecoderShape(3584, 18944, 28, 28, 4, 128, 152064, 32768, qkv_bias=True),
            _qwen2(3584),
            _QWEN2_PICTURES,
        ),
        ModelShape(
            "qwen2.5-vl-3b",
            DecoderShape(2048, 11008, 36, 16, 2, 128, 151936, 128000, tied_head=True, qkv_bias=True),
            _qwen25(2048),
            _QWEN2_PICTURES,
        ),
        ModelShape(
            "qwen2.5-vl-7b",
            DecoderShape(3584, 18944, 28, 28, 4, 128, 152064, 128000, qkv_bias=True),
            _qwen25(3584),
            _QWEN2_PICTURES,
        ),
        ModelShape(
            "qwen3-vl-4b",
            DecoderShape(2560, 9728, 36, 32, 8, 128, 151936, 262144, tied_head=True, head_norms=True),
            _qwen3(1024, 4096, 24, 2560),
            _QWEN3_PICTURES,
        ),
        ModelShape(
            "qwen3-vl-8b",
            DecoderShape(4096, 12288, 36, 32, 8, 128, 151936, 262144, head_norms=True),
            _qwen3(1152, 4304, 27, 4096),
            _QWEN3_PICTURES,
        ),
    )
}


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def shape_of_checkpoint(directory: Path, name: str) -> ModelShape:
    """The shape of a checkpoint from its config.json alone; :class:`BadModel` as `read_spec`."""
    spec = read_spec(directory)
    config = read_json(directory / "config.json") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or config["text_config"].get("dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise BadModel(f"{directory}/config.json: dtype {quoted(dtype)} is none of {', '.join(_ITEM_BYTES)}")
    return shape_of_spec(spec, name, _ITEM_BYTES[dtype])


def shape_of_spec(spec: ModelSpec, name: str, itemsize: int) -> ModelShape:
    """The shape of a model whose elements have ``itemsize`` bytes."""
    text = spec.text
    decoder = DecoderShape(
        text.hidden_size,
        text.intermediate_size,
        text.layers,
        text.heads,
        text.kv_heads,
        text.head_dim,
        text.vocab_size,
        text.context,
        text.tied_head,
        text.qkv_bias,
        text.out_bias,
        text.mlp_bias,
        text.head_norms,
    )
    return ModelShape(name, decoder, spec.vision_shape, spec.picture, itemsize)


def known_shape(name: str) -> ModelShape:
    """The published model of that name, in any case; :class:`BadModel` lists them."""
    shape = KNOWN.get(name.lower())
    if shape is None:
        raise BadModel(
            f"there is no model {name!r}: give 'demo', the directory of a checkpoint, or one of {', '.join(KNOWN)}"
        )
    return shape
