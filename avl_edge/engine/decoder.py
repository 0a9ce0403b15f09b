"""What the decoder's engine serves: one engine, its weights once, with a profile for prompts and one for steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from ..spec import ModelSpec
from .recipe import Recipe
from .tensorrt import Sizes

PROMPT, STEP = 0, 1
"""The profiles' places in the engine."""
_SCORE_QUERIES = 64  # of a usual prompt: the text after the image


@dataclass(frozen=True)
class Plugin:
    """The attention that TensorRT does not have: ``digest`` of its kernels, and what makes it known to TensorRT."""

    digest: str
    register: Callable[[ModuleType], None]


def decoder_profiles(spec: ModelSpec, recipe: Recipe) -> list[Mapping[str, Sizes]]:
    """:data:`PROMPT` and :data:`STEP`: the sizes of each dimension in the decoder's table of bindings.

    A prompt is one sequence, with rows where it goes on from what the pool holds already. A step is one new token for
    each of up to ``recipe.sequences``, whose lists of rows together have room for a full context each.
    """
    tokens, batch, context = recipe.prompt_tokens, recipe.sequences, spec.text.context
    features = recipe.images * spec.tokens_per_image
    pool = {"R": (1, recipe.pool_rows, recipe.pool_rows)}
    prompt = {
        "T": (1, tokens, tokens),
        "F": (1, features, features),
        "B + 1": (2, 2, 2),
        "N": (1, 1, context),
        "W": (0, min(_SCORE_QUERIES, tokens), tokens),
        "survivors": (1, tokens, tokens),
    }
    step = {
        "T": (1, 1, batch),
        "F": (1, 1, 1),
        "B + 1": (2, 2, batch + 1),
        "N": (1, min(tokens, context), batch * context),
        "W": (0, 1, batch),
        "survivors": (1, 1, batch),
    }
    return [{**pool, **prompt}, {**pool, **step}]
