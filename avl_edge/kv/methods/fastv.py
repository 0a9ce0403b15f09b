"""FastV (arXiv 2403.06764, ECCV 2024; public code pkunlp-icler/FastV): image tokens leave the model early, for good.

After the layer of index K - 1 the image tokens are ranked by the last query's attention, averaged over the heads; the
lowest R percent leave all deeper layers, for the prompt and for every step after it. The layers before K hold all rows.

Where paper and code leave room: the ranking is made once, for the prompt, as in the public code with a KV cache (the
paper's first code ranks anew at every token); what stays is round((1 - R) * N), halves to even, as in that code; with
several images N is their total.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import PromptShape, require
from .arithmetic import exact
from .base import Method, TierPeaks, Tiers, parameter
from .policy import KeepsCore, Kept, PromptLayer, Prune, Queries, Settlement, Step


@dataclass(frozen=True)
class FastV(Method):
    """The defaults are the published ones."""

    layer: int = parameter(2, "the first layer (0-based, at least 1) without the dropped tokens", "K", is_layer=True)
    drop: float = parameter(50, "percent of the image tokens that are dropped", "R")

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "image tokens with little attention leave the model after an early layer, for good"
    source: ClassVar[str] = "FastV, arXiv 2403.06764, ECCV 2024"

    def __post_init__(self) -> None:
        require(
            self.layer >= 1 and float(self.layer).is_integer(),
            f"layer (K) must be a whole number, at least 1, not {self.layer:g}",
        )
        require(0 <= self.drop <= 100, f"drop (R) must be from 0 to 100 percent, not {self.drop:g}")

    def kept(self, images: int) -> int:
        """Image tokens that stay, of ``images``."""
        return round(images * (100 - exact(self.drop)) / 100)

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int:
        dropped = prompt.images - self.kept(prompt.images)
        return layers * (prompt.length + steps) - max(layers - int(self.layer), 0) * dropped

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        text = layers * (prompt.prefix + prompt.suffix + steps)
        return TierPeaks(text, self.peak_rows(prompt, steps, layers) - text, 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:
        text = prompt.prefix + prompt.suffix
        return Tiers.of(prompt, steps, text + steps, self.tokens_in(prompt, layer) - text)

    def tokens_in(self, prompt: PromptShape, layer: int) -> int:
        return prompt.length - (prompt.images - self.kept(prompt.images) if layer >= self.layer else 0)

    def policy(self, prompt: PromptShape, layers: int) -> FastVPolicy:
        return FastVPolicy(self, prompt, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[FastV]:
        """The dial is R, from 0 to 100; what still does not fit drops as much one layer earlier."""
        drops = [fixed["drop"]] if "drop" in fixed else range(101)
        first, *earlier = [fixed["layer"]] if "layer" in fixed else range(cls.layer, 0, -1)
        for drop in drops:
            yield cls(first, drop)  # type: ignore[arg-type]
        for layer in earlier:
            yield cls(layer, drops[-1])  # type: ignore[arg-type]


class FastVPolicy(KeepsCore):
    """One request under FastV: a prune of the prompt, then every row that is there."""

    def __init__(self, settings: FastV, prompt: PromptShape, layers: int) -> None:
        self._kept = settings.kept(prompt.images)
        prunes = self._kept < prompt.images and settings.layer < layers
        self._ranked_layer = settings.layer - 1 if prunes else None

    def prompt_queries(self, layer: int) -> Queries:
        return "last" if layer == self._ranked_layer else "none"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        return Kept(stored=np.ones_like(view.is_image), core=view.is_image)

    def prunes(self, layer: int) -> Prune | None:
        return Prune(self._kept, "last") if layer == self._ranked_layer else None

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return False

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return False

    def settle_step(self, step: Step) -> Settlement:  # noqa: ARG002
        return Settlement()
