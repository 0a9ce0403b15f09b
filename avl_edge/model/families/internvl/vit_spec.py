"""The vision transformer of InternVL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InternVitSpec:
    """InternViT: square tiles of ``image_size`` pixels in patches of ``patch_size``; ``qkv_bias``: on query, key and
    value; ``head_norms``: an RMSNorm for all heads of query and of key together; ``rms``: the layers' norms are such;
    ``last_norm``: a LayerNorm behind the last layer."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    qkv_bias: bool
    head_norms: bool
    rms: bool
    last_norm: bool

    @property
    def side(self) -> int:
        """Patches along the edge of a tile."""
        return self.image_size // self.patch_size
