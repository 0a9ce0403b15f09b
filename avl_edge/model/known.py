"""The published models by name, and any checkpoint of a known family by its config.json.

Sizes are those of the models' config.json files.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BadModel, quoted
from ..files import read_json
from .families import published, read_spec
from .sizes import DecoderShape, ModelShape, Precision
from .spec import ModelSpec
from .weight_format import WeightFormats, stored_formats

KNOWN: dict[str, ModelShape] = {shape.name: shape for shape in published()}


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def shape_of_checkpoint(directory: Path, name: str) -> ModelShape:
    """The shape of a checkpoint from its config.json alone; :class:`BadModel` as `read_spec`."""
    spec = read_spec(directory)
    config = read_json(directory / "config.json") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise BadModel(f"{directory}/config.json: dtype {quoted(dtype)} is none of {', '.join(_ITEM_BYTES)}")
    return shape_of_spec(spec, name, _ITEM_BYTES[dtype], stored_formats(config))


def shape_of_spec(
    spec: ModelSpec,
    name: str,
    itemsize: int,
    formats: WeightFormats = WeightFormats(),  # noqa: B008
) -> ModelShape:
    """The shape of a model whose elements have ``itemsize`` bytes, but for matrices in ``formats``."""
    text, plain = spec.text, "fp32" if itemsize == 4 else "fp16"
    names = [plain if each is None else each.name for each in (formats.body, formats.head)]
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
    return ModelShape(name, decoder, spec.vision_shape, spec.picture, itemsize, Precision(*names))


def known_shape(name: str) -> ModelShape:
    """The published model of that name, in any case; :class:`BadModel` lists them."""
    shape = KNOWN.get(name.lower())
    if shape is None:
        raise BadModel(
            f"there is no model {name!r}: give 'demo', the directory of a checkpoint, or one of {', '.join(KNOWN)}"
        )
    return shape
