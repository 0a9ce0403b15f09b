"""The published LLaVA-1.6 models, by the sizes in their config.json files."""

from __future__ import annotations

from ...sizes import DecoderShape
from ..llava.published import VICUNA_7B, VICUNA_13B, model_shape
from .pictures import AnyRes

_MISTRAL_7B = DecoderShape(4096, 14336, 32, 32, 8, 128, 32064, 32768)
_DECODERS = {"vicuna-7b": VICUNA_7B, "vicuna-13b": VICUNA_13B, "mistral-7b": _MISTRAL_7B}

# The newline is one vector of the decoder's width.
PUBLISHED = tuple(
    model_shape(f"llava-1.6-{name}", decoder, AnyRes(), decoder.hidden_size) for name, decoder in _DECODERS.items()
)
