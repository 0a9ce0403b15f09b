"""The vision transformer of a Qwen."""

from __future__ import annotations

from dataclasses import dataclass

from .pictures import FRAMES


@dataclass(frozen=True)
class PatchVitSpec:
    """A vision transformer over patches of ``patch_size`` pixels, of which ``merge`` x ``merge`` become a token."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    patch_size: int
    merge: int
    activation: str
    theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return 3 * FRAMES * self.patch_size**2
