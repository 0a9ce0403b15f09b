"""What the decoder's engine serves: one engine, its weights once, with a profile for prompts and one for steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from ...attention.cuda import DTYPES
from ...kv.layout import UNIT
from ...model.families.llava import LlavaSpec
from ..export import row_formats
from .recipe import Recipe
from .tensorrt import Sizes

PROMPT, STEP = 0, 1
"""The profiles' indices in the engine."""
_SCORE_QUERIES = 64  # of a usual prompt: the text after the image


@dataclass(frozen=True)
class Plugin:
    """The attention that TensorRT does not have: ``digest`` of its kernels, and what makes it known to TensorRT."""

    digest: str
    register: Callable[[ModuleType], None]


def decoder_formats(spec: LlavaSpec, precision: str) -> tuple[str, ...]:
    """The formats that rows may have in an engine of ``precision``, in the order of their parts: the plugin reads
    packed rows beside those of 16 bits."""
    formats = row_formats(spec.text, precision)
    return formats if precision in DTYPES else formats[:1]


def decoder_profiles(spec: LlavaSpec, recipe: Recipe, precision: str) -> list[Mapping[str, Sizes]]:
    """:data:`PROMPT` and :data:`STEP`: the sizes of each dimension in the decoder's table of bindings.

    A prompt is one sequence; as a question over a shared prefix it goes on from that one's rows, up to a full context
    of them. A step is one new token for each of up to ``recipe.sequences``, whose lists of rows together have room for
    a full context each. Rows are of any of :func:`decoder_formats`.
    """
    tokens, batch, context = recipe.prompt_tokens, recipe.sequences, spec.text.context
    features = recipe.images * spec.tokens_per_image
    parts = len(decoder_formats(spec, precision))
    row = spec.text.kv_shape(4 if precision == "float32" else 2).row_bytes // 2
    units = recipe.pool_rows * row // UNIT
    pool = {"R": (1, recipe.pool_rows, recipe.pool_rows), "U": (1, units, units)}
    prompt = {
        "T": (1, tokens, tokens),
        "P * T": (1, tokens, parts * tokens),
        "F": (1, features, features),
        "B + 1": (2, 2, 2),
        "P * B + 1": (2, 2, parts + 1),
        "N": (1, 1, context),
        "W": (0, min(_SCORE_QUERIES, tokens), tokens),
        "survivors": (1, tokens, tokens),
    }
    step = {
        "T": (1, 1, batch),
        "P * T": (1, 1, parts * batch),
        "F": (1, 1, 1),
        "B + 1": (2, 2, batch + 1),
        "P * B + 1": (2, 2, parts * batch + 1),
        "N": (1, min(tokens, context), batch * context),
        "W": (0, 1, batch),
        "survivors": (1, 1, batch),
    }
    return [{**pool, **prompt}, {**pool, **step}]
