"""The published LLaVA-1.5 models, by the sizes in their config.json files."""

from __future__ import annotations

from ...pictures import Fixed, PictureRule
from ...sizes import DecoderShape, ModelShape, VisionShape

SQUARE = Fixed.clip(24**2)

VICUNA_7B = DecoderShape(4096, 11008, 32, 32, 32, 128, 32064, 4096)
VICUNA_13B = DecoderShape(5120, 13824, 40, 40, 40, 128, 32064, 4096)


def vision_shape(
    width: int, inner: int, layers: int, positions: int, patch: int, hidden: int, runs: int, extra: int = 0
) -> VisionShape:
    """CLIP with LLaVA's two-layer projector from ``width`` features to ``hidden``; ``extra`` parameters beside them."""
    embeddings = width * (1 + 3 * patch**2 + positions) + 4 * width
    projector = width * hidden + hidden + hidden * hidden + hidden
    small = 4 * width + inner + width + 4 * width
    return VisionShape(width, inner, layers, patch, embeddings + projector + extra, small, runs=runs, states=runs)


def model_shape(name: str, decoder: DecoderShape, rule: PictureRule, extra: int = 0) -> ModelShape:
    """A decoder behind CLIP-L/14 of 336 pixels."""
    return ModelShape(
        name, decoder, vision_shape(1024, 4096, 24, SQUARE.patches, 14, decoder.hidden_size, 23, extra), rule
    )


PUBLISHED = (
    model_shape("llava-1.5-7b", VICUNA_7B, SQUARE),
    model_shape("llava-1.5-13b", VICUNA_13B, SQUARE),
)
