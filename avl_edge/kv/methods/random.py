"""Random rows: each layer stores image rows by chance. No method, but the bound that every method has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import PromptShape, require
from .arithmetic import share, spread, whole
from .base import Method, TierPeaks, Tiers, parameter
from .full import FullPolicy
from .policy import Kept, PromptLayer


@dataclass(frozen=True)
class Random(Method):
    """All stored rows are core."""

    secondary: float = parameter(50, "percent of image rows stored per layer", "S")
    draw: int = parameter(0, "a number for each drawing")

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "image rows by chance: what every method has to beat"
    source: ClassVar[str] = "a baseline"

    def __post_init__(self) -> None:
        require(0 < self.secondary <= 100, f"secondary (S) must be above 0 and at most 100, not {self.secondary:g}")
        require(whole(self.draw) and self.draw >= 0, f"draw must be a whole number from 0, not {self.draw:g}")

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        text = prompt.prefix + prompt.suffix + steps
        return TierPeaks(layers * text, layers * share(prompt.images, self.secondary), 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        text = prompt.prefix + prompt.suffix + steps
        return Tiers.of(prompt, steps, text, share(prompt.images, self.secondary))

    def policy(self, prompt: PromptShape, layers: int) -> RandomPolicy:  # noqa: ARG002
        return RandomPolicy(self, prompt)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Random]:
        """The dial is S, from 100 percent down to 1."""
        for s in [fixed["secondary"]] if "secondary" in fixed else range(100, 0, -1):
            yield cls(**{**fixed, "secondary": s})  # type: ignore[arg-type]


class RandomPolicy(FullPolicy):
    """One request: full attention over fewer rows."""

    def __init__(self, settings: Random, prompt: PromptShape) -> None:
        self._stored = share(prompt.images, settings.secondary)
        self._draw = int(settings.draw)

    def keep_prompt(self, view: PromptLayer) -> Kept:
        count = int(view.is_image.sum())
        chosen = np.zeros(count, dtype=np.bool_)
        chosen[np.random.default_rng((self._draw, view.layer)).permutation(count)[: self._stored]] = True
        image = spread(chosen, view.is_image)
        return Kept(stored=~view.is_image | image, core=image)
