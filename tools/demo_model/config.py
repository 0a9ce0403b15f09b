"""The sizes of the model."""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_model.canvas import GRID


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the shipped ones."""

    vocab: int = 1024
    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 3
    vision_ff: int = 768
    width: int = 256
    layers: int = 8
    heads: int = 4
    ff: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def image_tokens(self) -> int:
        return GRID * GRID
